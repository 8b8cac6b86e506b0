"""Scores of a model that stays on disk: second-order losses of the model in memory, a block at a time, resumed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import linearize
from linearize.calibration.keys import tokens_key
from linearize.capture.on_disk import capture_directory
from linearize.errors import DataError
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.planner.candidates import Candidate, candidate
from linearize.planner.make import Wishes, make_planner
from linearize.planner.planning import Budget, Planner
from linearize.planner.scores import Scores, planner_scores
from linearize.planner.streamed import StreamedBench
from linearize.planner.streamed_memory import needed
from linearize.planner.student import Student, losses_of, losses_streamed
from linearize.planner.target import H200
from linearize.program import Program
from linearize.progress import Progress

VOCAB, LENGTH = 64, 24
WANTED = [
    candidate("window", {"window": 3}, LENGTH, LENGTH),
    candidate("lolcats", {"window": 4, "features": 4}, LENGTH, LENGTH),
    candidate("slots", {"slots": 4, "window": 4}, LENGTH, LENGTH),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers with weights wide enough for attention to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("source") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="8KB")
    return path


@functools.cache
def on_disk(path: Path) -> Program:
    return run_pipeline(capture_directory(path), [RaiseAttention()])


@functools.cache
def in_memory(path: Path) -> Program:
    from transformers import AutoModelForCausalLM

    return run_pipeline(linearize.capture(AutoModelForCausalLM.from_pretrained(path)), [RaiseAttention()])


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


def rows(count: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (1, LENGTH), generator=generator) for _ in range(count)]


def scored(program: Program, walk: Path | None = None, wanted: list[Candidate] = WANTED) -> Scores:
    candidates = {site.index: wanted for site in program.matched}
    return planner_scores(program, rows, tokens_key(rows()), candidates, Progress(False), walk=walk)


@pytest.mark.parametrize("kept", ["disk", "memory"])
def test_one_walk_back_gives_the_gradients_of_the_model_in_memory(source: Path, tmp_path: Path, kept: str) -> None:
    """The same draws, so the same numbers: errors, and losses to second order, whole and by head."""
    expected = scored(in_memory(source))
    found = scored(on_disk(source), tmp_path / "walk" if kept == "disk" else None)
    assert (found.second_order, expected.second_order) == (True, False)
    for site, table in expected.table.items():
        for name, row in table.items():
            assert found.table[site][name].loss == found.table[site][name].fisher
            assert found.table[site][name].fisher == pytest.approx(row.fisher, rel=1e-3)
            assert found.table[site][name].error == pytest.approx(row.error, rel=1e-3)
            assert row.loss > 0


def test_one_block_of_weights_is_in_memory_at_a_time(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is held while a site is scored is less than a third of the three layers."""
    program, held = on_disk(source), list[int]()
    assert program.weights is not None
    own = program.weights
    score = StreamedBench.score

    def noting(self: StreamedBench, one: Candidate) -> Any:
        held.append(sum(tensor.numel() for tensor in own._held.values()))
        return score(self, one)

    monkeypatch.setattr(StreamedBench, "score", noting)
    scored(program)
    whole = sum(parameter.numel() for parameter in in_memory(source).module.parameters())
    assert len(held) == 9
    assert 0 < max(held) < whole / 3


def test_what_an_interruption_left_is_gone_on_from(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted at the second of three candidates of the second site of three from the end."""
    program, walk = on_disk(source), tmp_path / "walk"
    whole = scored(program)
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "another"))
    score, seen = StreamedBench.score, list[tuple[int, str]]()

    def failing(self: StreamedBench, one: Candidate) -> Any:
        seen.append((self.site.index, one.mixer))
        if len(seen) == 5:
            raise KeyboardInterrupt
        return score(self, one)

    monkeypatch.setattr(StreamedBench, "score", failing)
    with pytest.raises(KeyboardInterrupt):
        scored(program, walk)
    assert [site for site, _ in seen] == [2, 2, 2, 1, 1]
    found = scored(program, walk)
    assert seen[5:] == [(1, "lolcats"), (1, "slots"), (0, "window"), (0, "lolcats"), (0, "slots")]
    assert found.table == whole.table


def test_plans_are_measured_as_they_are_in_memory(source: Path) -> None:
    from linearize.mixers import build_mixer

    site, program = on_disk(source).matched[1], on_disk(source)
    plans = [{1: build_mixer("window", site.attention, {"window": 3})},
             {1: build_mixer("share", site.attention, {"of": 0})}, {}]  # fmt: skip
    found = losses_streamed(Student(program), rows(), plans)
    expected = losses_of(Student(in_memory(source)), rows(), plans)
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=1e-4, atol=1e-7)
    assert found[2] == [0.0] * 3
    assert min(found[0]) > 0


@pytest.fixture
def planner(source: Path) -> Callable[..., Planner]:
    def made(**options: Any) -> Planner:
        wishes = Wishes(mixers=("window", "slots", "moa"))
        return make_planner(
            on_disk(source), 256, H200, **{"data": rows(4), "tokens": 2 * LENGTH, "wishes": wishes} | options
        )

    return made


def test_a_plan_for_a_model_on_disk_says_how_it_was_predicted(planner: Callable[..., Planner]) -> None:
    told: list[str] = []
    made = planner(say=told.append)
    budget = Budget(0.5 * made.source_bytes, text="50%")
    plan = made.plan(made.best(budget, measurements=2), budget)
    assert plan.figures is not None
    assert plan.figures.estimate == "second order"
    assert plan.figures.measured_loss is not None
    assert 0 < plan.figures.state_bytes <= budget.limit
    assert "of memory (largest block" in told[0]


def test_nothing_of_the_walk_is_left(planner: Callable[..., Planner], tmp_path: Path) -> None:
    planner()
    assert list((tmp_path / "cache" / "planner").glob("*.json"))
    assert not list((tmp_path / "cache" / "planner").glob("*.walk"))


def test_what_does_not_fit_is_refused_before_the_work(planner: Callable[..., Planner], source: Path) -> None:
    with pytest.raises(DataError, match=r"scoring needs about .* what helps: shorter rows"):
        planner(memory=2**20)
    with pytest.raises(DataError, match=r"stays on disk is not sampled.*--data FILE"):
        planner(data=None)
    assert needed(on_disk(source), rows()).disk > 0
