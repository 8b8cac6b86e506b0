"""Scores: what they are, that they are remembered and gone on from, and that gradients split a loss over heads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from linearize.calibration.fit import output_error
from linearize.calibration.keys import tokens_key
from linearize.calibration.teacher import TeacherStream
from linearize.mixers import build_mixer
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.plan import PlanEntry
from linearize.planner import scores as scores_module
from linearize.planner.candidates import Candidate, candidate, default_candidates
from linearize.planner.choices import SHRUNK, shrunk
from linearize.planner.measuring import measured
from linearize.planner.scores import Scores, planner_scores, prepared
from linearize.planner.sensitivity import effects, gradients, second_order, sketch
from linearize.planner.student import Student, divergence
from linearize.program import Program
from linearize.progress import Progress
from linearize.spec import Site
from tests import zoo

DROP, WINDOW, KEEP = Candidate("drop"), candidate("window", {"window": 3}, 24, 24), Candidate("keep")
BATCHES = [zoo.tokens(1, 24, seed) for seed in range(3)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


def teacher(name: str = "llama") -> Program:
    return run_pipeline(zoo.captured(name), [RaiseAttention()])


def scored(program: Program, *wanted: Candidate) -> Scores:
    candidates = {site.index: list(wanted) for site in program.matched}
    return planner_scores(program, lambda: BATCHES, tokens_key(BATCHES), candidates, Progress(False))


def test_a_loss_is_that_of_the_model_with_the_candidate_there() -> None:
    program = teacher()
    found = scored(program, WINDOW, KEEP)
    for site in program.matched:
        entry = PlanEntry(site=site.index, module=site.module, mixer="window", options={"window": 3})
        expected = measured(program, BATCHES, BATCHES, [[entry]])[0]
        assert found.table[site.index][WINDOW.measured_as].loss == pytest.approx(expected, rel=1e-4)
        assert found.table[site.index]["keep"].loss == 0.0
    assert found.tokens == 72


def test_scores_are_remembered_and_new_candidates_measured_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    program = teacher()
    measured_ones: list[str] = []
    score = scores_module.SiteBench.score
    monkeypatch.setattr(
        scores_module.SiteBench, "score", lambda self, one: measured_ones.append(one.label) or score(self, one)
    )
    first = scored(program, WINDOW)
    assert measured_ones == [WINDOW.label] * 2
    again = scored(program, WINDOW, DROP)
    assert measured_ones[2:] == ["drop"] * 2
    assert all(again.table[site][WINDOW.measured_as] == row[WINDOW.measured_as] for site, row in first.table.items())


def test_an_interrupted_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed at the third of four candidates: the next run measures two, and all is as if it had not been."""
    program = teacher()
    whole = scored(program, WINDOW, DROP)
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "another"))
    score, calls = scores_module.SiteBench.score, 0

    def failing(self: scores_module.SiteBench, one: Candidate) -> scores_module.Scored:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return score(self, one)

    monkeypatch.setattr(scores_module.SiteBench, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        scored(program, WINDOW, DROP)
    assert scored(program, WINDOW, DROP).table == whole.table
    assert calls == 3 + 2


def small_error(stream: TeacherStream, site: Site) -> tuple[Tensor, Tensor]:
    """(the output, an error of a fiftieth of it), of the stream's first batch."""
    output = stream.values([site.nodes.core], 0)[0]
    return output, 0.02 * torch.randn(output.shape, generator=torch.Generator().manual_seed(0))


def loss_of(stream: TeacherStream, site: Site, output: Tensor) -> float:
    return divergence(stream.logits(0).double(), stream.logits(0, {site.nodes.core: output}).double())


@torch.no_grad()
def test_the_gradients_predict_the_loss_of_a_small_error_at_every_head() -> None:
    """To second order: what the whole error loses when the model runs, and what that of each kv head loses alone."""
    stream = TeacherStream(teacher(), BATCHES[:1])
    site = stream.program.matched[0]
    output, error = small_error(stream, site)
    whole, heads = second_order(effects(gradients(stream, site, 0, samples=200, seed=0), error, 2))
    assert whole.item() == pytest.approx(loss_of(stream, site, output + error), rel=0.1)
    for head, own in enumerate(heads.tolist()):
        alone = torch.zeros_like(error)
        alone[:, 2 * head : 2 * head + 2] = error[:, 2 * head : 2 * head + 2]
        assert own == pytest.approx(loss_of(stream, site, output + alone), rel=0.1)


@torch.no_grad()
def test_the_sketch_tells_what_errors_of_heads_lose_together() -> None:
    """Errors of two heads whose losses do not add up: the loss of both is the sketch's to within its own noise."""
    stream = TeacherStream(teacher(), BATCHES[:1])
    site = stream.program.matched[0]
    output, error = small_error(stream, site)
    error[:, 2:] = error[:, :2]
    effect = effects(gradients(stream, site, 0, samples=200, seed=0), error, 2)
    _, heads = second_order(effect)
    known = shrunk(sketch(effect, 1024, seed=0).numpy(), heads.numpy()) / (1 - SHRUNK) ** 0.5
    together = 0.5 * float((known[:, :1024].sum(0) ** 2).sum())
    loss = loss_of(stream, site, output + error)
    assert abs(loss / heads.sum().item() - 1) > 0.15
    assert together == pytest.approx(loss, rel=0.08)


def test_a_head_without_error_has_no_effect() -> None:
    gradient, error = torch.randn(5, 1, 4, 6, 3), torch.randn(1, 4, 6, 3)
    error[:, 2:] = 0
    effect = effects(gradient, error, 2)
    whole, heads = second_order(effect)
    assert heads[1] == 0
    torch.testing.assert_close(heads[0], whole)
    assert sketch(effect, 8, seed=0)[1].abs().sum() == 0


def test_a_sketch_keeps_inner_products_and_batches_of_it_add() -> None:
    effect = torch.randn(4, 3, 2, 50, generator=torch.Generator().manual_seed(0)).double()
    effect[:, :, 1] += effect[:, :, 0]
    kept = sketch(effect, 512, seed=0)
    expected = torch.einsum("sbgt,sbht->gh", effect, effect) / 4
    torch.testing.assert_close(kept @ kept.T, expected, rtol=0.2, atol=0)
    torch.testing.assert_close(sketch(3 * effect, 512, seed=0), 3 * kept)
    assert sketch(effect, 7, seed=0).shape == (2, 7)


@torch.no_grad()
def test_a_learning_mixer_is_scored_after_its_closed_form() -> None:
    stream = TeacherStream(teacher(), BATCHES)
    site = stream.program.matched[0]
    found = prepared(stream, site, "gla", {"window": 3, "maps": True})
    plain = build_mixer("gla", site.attention, {"window": 3, "maps": True})
    plain.prepare(*stream.site_values(site, plain.needs, 0))
    assert output_error(found, stream, site) < 0.99 * output_error(plain, stream, site)


def test_a_student_without_mixers_is_the_teacher() -> None:
    for name in ("llama", "gpt2"):
        program = teacher(name)
        logits = Student(program).logits(BATCHES[0], {})
        torch.testing.assert_close(logits, TeacherStream(program, BATCHES[:1]).logits(0))


def test_a_student_is_the_compiled_plan() -> None:
    program = teacher()
    compiled = zoo.compile_again("llama", "slots{window=3,slots=4}", tokens=0)
    options = dict(compiled.plan.entries[0].options)
    mixers = {site.index: build_mixer("slots", site.attention, options) for site in program.matched}
    torch.testing.assert_close(Student(program).logits(BATCHES[0], mixers), compiled(BATCHES[0]).logits)


def test_sizes_are_scored_at_the_same_number_per_token() -> None:
    one = candidate("slots", {"slots": 256, "window": 32}, 4096, 1024)
    assert (one.label, one.measured_as) == ("slots{slots=256,window=32}", "slots{slots=64,window=32}")
    assert candidate("window", {"window": 64}, 4096, 1024).scored == (("window", 64),)
    assert candidate("window", {"window": 512}, 4096, 1024).scored == (("window", 128),)
    assert candidate("slots", {"slots": 256}, 1024, 1024).scored == (("slots", 256),)
    mixers = {one.mixer for one in default_candidates(4096, 1024)}
    assert mixers >= {"drop", "keep", "slots", "window", "moments", "mla"}
