"""Distillation of the whole model: it helps or it is undone, and a run that was cut off ends as one that was not."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import linearize
from linearize.calibration import end_to_end_state
from linearize.calibration.end_to_end import Step, planned_steps, rows_of
from linearize.calibration.end_to_end_pair import Pair, cut_windows, head_of, mixers_in
from linearize.calibration.evaluate import agreement, logits_of
from linearize.distill import FULL_FROM, Distill
from linearize.errors import RewriteError
from linearize.passes.calibrate.distill_end_to_end import as_rows
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.program import Program
from linearize.recipe import Recipe
from linearize.runtime.model import LinearizedModel
from tests import zoo

HOW = {"lengths": (12, 24), "batch": 4, "rank": 2, "learning_rate": 0.01}


@functools.cache
def llama() -> Program:
    """Not the zoo's own, as in test_checkpoints."""
    return linearize.capture(zoo.BY_NAME["llama"].build())


def rows(count: int = 12) -> list[Tensor]:
    return [zoo.tokens(4, 24, seed=seed) for seed in range(count)]


def distilled(folder: str | Path | None = None, tokens: int = 48 * 40, **changes: object) -> LinearizedModel:
    base = Recipe.load("lizard{window=4,maps=true}")
    recipe = base.model_copy(
        update={"fit": base.fit.model_copy(update={"passes": 0}), "distill": Distill(**{**HOW, **changes})}  # type: ignore[arg-type]
    )
    return linearize.compile(
        llama(), recipe, calibration=rows(), tokens=10**6, distill=tokens, progress=False, checkpoints=folder
    )


@functools.cache
def whole() -> LinearizedModel:
    return distilled()


def weights(model: LinearizedModel) -> dict[str, Tensor]:
    return dict(model.source.module.state_dict())


@pytest.mark.parametrize("trainable", ["adapters", "full"])
def test_the_divergence_falls_and_the_source_stays(trainable: str) -> None:
    before = {name: tensor.clone() for name, tensor in llama().module.state_dict().items()}
    model = whole() if trainable == "adapters" else distilled(trainable="full")
    found = model.report.end_to_end
    assert found is not None
    assert found.kept
    assert found.kl_end < 0.95 * found.kl_start
    assert found.trained == {"adapters": "adapters", "full": "projections"}[trainable]
    assert all(torch.equal(tensor, before[name]) for name, tensor in llama().module.state_dict().items())
    assert all(p.grad is None for p in llama().module.parameters())
    changed = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(model.source.module.get_parameter(changed), llama().module.get_parameter(changed))


def test_what_is_reported_is_what_the_model_does(tmp_path: Path) -> None:
    model = whole()
    held = [rows()[7]]  # every eighth batch
    source = zoo.BY_NAME["llama"].build()
    close = agreement(logits_of(source), logits_of(model), held)
    assert model.report.end_to_end is not None
    assert close.kl == pytest.approx(model.report.end_to_end.kl_end, rel=1e-3)
    model.save_pretrained(tmp_path / "saved")
    again = linearize.load(tmp_path / "saved")
    assert agreement(logits_of(source), logits_of(again), held).kl == pytest.approx(close.kl, rel=1e-4)
    assert again.report.end_to_end == model.report.end_to_end


def test_training_that_does_not_help_is_undone_and_said() -> None:
    plain, spoilt = distilled(tokens=0), distilled(tokens=48 * 6, learning_rate=30.0)
    assert spoilt.report.end_to_end is not None
    assert not spoilt.report.end_to_end.kept
    assert spoilt.report.end_to_end.kl_end == spoilt.report.end_to_end.kl_start
    assert any("held-out KL did not fall" in note for note in spoilt.report.notes)
    ids = zoo.tokens(2, 20)
    assert (plain(ids).logits - spoilt(ids).logits).abs().max() <= 1e-5
    assert plain.report.end_to_end is None


def killed(folder: str, step: int) -> None:
    """Distil, and die by kill -9 when the checkpoint of that step has been written."""
    keep = end_to_end_state.TrainingState.keep

    def kill(self, found, *rest):  # type: ignore[no-untyped-def]
        keep(self, found, *rest)
        if found.step >= step:
            os.kill(os.getpid(), signal.SIGKILL)

    end_to_end_state.TrainingState.keep = kill
    distilled(folder)


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(__file__).parents[2])
    call = f"from {__name__} import killed; killed({str(tmp_path)!r}, step=20)"
    code = f"import sys; sys.path.append({root!r}); {call}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    steps: list[int] = []
    keep = end_to_end_state.TrainingState.keep

    def counted(self, found, *rest):  # type: ignore[no-untyped-def]
        steps.append(found.step)
        keep(self, found, *rest)

    monkeypatch.setattr(end_to_end_state.TrainingState, "keep", counted)
    again = distilled(tmp_path)
    assert steps == [40]  # of 20 and 40 steps only the second was left to do
    expected = weights(whole())
    for name, tensor in weights(again).items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)
    assert again.report.end_to_end is not None
    assert whole().report.end_to_end is not None
    assert again.report.end_to_end.kl_end == pytest.approx(whole().report.end_to_end.kl_end, abs=1e-6)


def test_an_interrupt_keeps_the_step_it_came_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize.calibration.end_to_end import EndToEnd

    one = EndToEnd._one

    def interrupt(self, step, *rest):  # type: ignore[no-untyped-def]
        if step == 7:
            raise KeyboardInterrupt
        one(self, step, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(EndToEnd, "_one", interrupt)
        with pytest.raises(KeyboardInterrupt):
            distilled(tmp_path)
    begun: list[int] = []
    monkeypatch.setattr(EndToEnd, "_one", lambda self, step, *rest: (begun.append(step), one(self, step, *rest)))
    again = distilled(tmp_path)
    assert begun[0] == 7
    for name, tensor in weights(again).items():
        torch.testing.assert_close(tensor, weights(whole())[name], rtol=0, atol=1e-6)


# ---- the plan of steps -----------------------------------------------------------------------------------------------


def test_steps_go_from_hidden_states_to_divergence_and_from_short_to_long() -> None:
    plan = planned_steps(Distill(tokens=48 * 16, lengths=(12, 24), batch=4, hidden_share=0.25), longest=24)
    assert plan[:4] == [Step("hidden", 12, 4)] * 4
    assert plan[4:10] == [Step("kl", 12, 4)] * 6
    assert plan[10:] == [Step("kl", 24, 2)] * 6
    assert {step.length for step in planned_steps(Distill(tokens=96, lengths=(12, 99), batch=4), 24)} == {12}
    assert {step.length for step in planned_steps(Distill(tokens=96, lengths=(64, 99), batch=1), 24)} == {24}


def test_every_token_of_the_data_is_read_before_one_is_read_again() -> None:
    data = torch.arange(5 * 24).reshape(5, 24)
    plan = [Step("kl", 12, 2)] * 5
    seen = torch.cat([rows_of(data, step, plan).flatten() for step in range(5)])
    assert torch.equal(seen.sort().values, torch.arange(120))
    assert torch.equal(rows_of(data, 0, [Step("kl", 24, 7)])[5:], data[:2])


def test_one_short_row_does_not_cut_the_others() -> None:
    batches = [torch.zeros(4, 24, dtype=torch.int64), torch.zeros(1, 5, dtype=torch.int64)]
    assert as_rows(batches).shape == (4, 24)
    assert as_rows([batches[1], torch.zeros(30, 6, dtype=torch.int64)]).shape == (30, 6)
    assert as_rows([batches[0][:1], torch.zeros(30, 12, dtype=torch.int64)]).shape == (31, 12)


def test_whole_projections_are_trained_from_fifty_million_tokens_on() -> None:
    assert not Distill(tokens=FULL_FROM - 1).full
    assert Distill(tokens=FULL_FROM).full
    assert not Distill(tokens=FULL_FROM, trainable="adapters").full
    assert Distill(tokens=1, trainable="full").full


# ---- teacher and student side by side --------------------------------------------------------------------------------


def pair(recipe: str, name: str = "llama") -> Pair:
    from linearize.passes.rewrite import CarryHistory, InsertMixers

    teacher = run_pipeline(zoo.captured(name), [RaiseAttention()])
    plan = Recipe.load(recipe).plan(teacher.matched)
    return Pair.of(teacher, run_pipeline(teacher, [InsertMixers(plan), CarryHistory()]))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2", "olmo2"])
def test_both_sides_compute_the_same_where_nothing_was_replaced(name: str) -> None:
    both, ids = pair("none", name), zoo.tokens(2, 10)
    ours, theirs = both.student.values(ids), both.teacher.values(ids)
    assert len(ours) == len(theirs) >= 2
    for one, other in zip(ours, theirs, strict=True):
        assert (one - other).abs().max() <= 1e-4
    head = both.student.head()
    logits = head.logits(ours[0].flatten(0, -2), 0, zoo.VOCAB).detach()
    expected = zoo.source_logits(name, ids).flatten(0, -2)
    torch.testing.assert_close(logits, expected, rtol=1e-3, atol=1e-3)


def test_cut_windows_leave_the_near_tokens_to_the_far_field() -> None:
    both, ids = pair("lizard{window=6}"), zoo.tokens(2, 20)
    mixers = mixers_in(both.student.program)
    with torch.no_grad():
        for mixer in mixers.values():
            mixer.beta.fill_(0.5)
        before = both.student.values(ids)
        with cut_windows(both.student.program):
            assert {mixer.line.window for mixer in mixers.values()} == {1}
            cut = both.student.values(ids)
        after = both.student.values(ids)
    assert (before[0] - cut[0]).abs().max() > 1e-3
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_plain_window_is_never_cut() -> None:
    both = pair("window{window=6}")
    with cut_windows(both.student.program):
        assert {mixer.line.window for mixer in mixers_in(both.student.program).values()} == {6}


def test_logits_that_no_linear_layer_makes_are_refused() -> None:
    program = zoo.captured("llama")
    module = program.copy_graph()
    output = next(node for node in module.graph.nodes if node.op == "output")
    with module.graph.inserting_before(output):
        softmax = module.graph.call_function(torch.ops.aten.log_softmax.int, (output.args[0], -1))
    output.args = (softmax,)
    with pytest.raises(RewriteError, match="cannot be distilled: its logits come from"):
        head_of(program.replace(module=module))
