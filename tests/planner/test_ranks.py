"""Weights of low rank under a budget of weight bytes: what each block loses, what is chosen, and the plan compiled."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from linearize.calibration.keys import tokens_key
from linearize.calibration.low_rank import whitened_factors
from linearize.errors import RecipeError
from linearize.passes.rewrite import LowerRank, RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.plan import Plan
from linearize.planner import ranks as ranks_module
from linearize.planner.make import Wishes, make_planner
from linearize.planner.planning import Budget, Planner
from linearize.planner.ranks import SHARES, Ranks, choose, rank_scores, saved_calls, weight_bytes
from linearize.planner.student import Student, divergence
from linearize.planner.target import H200
from linearize.program import Program
from linearize.progress import Progress
from tests import zoo

ROWS = [zoo.tokens(1, 32, seed) for seed in range(4)]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LINEARIZE_CACHE", str(folder))
        yield folder


def teacher() -> Program:
    return run_pipeline(zoo.captured("llama"), [RaiseAttention()])


def scored(program: Program) -> dict[int, list[Ranks]]:
    return rank_scores(program, lambda: ROWS[:2], tokens_key(ROWS[:2]), Progress(False))


def planner(weights: str) -> Planner:
    wishes = Wishes(mixers=("window",), weights=weights)
    return make_planner(zoo.captured("llama"), 256, H200, data=ROWS, tokens=64, wishes=wishes)


def test_a_loss_is_that_of_the_model_with_these_weights(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against the pass that compile runs; less kept never lose less; and what was measured is remembered."""
    program = teacher()
    table = scored(program)
    one = table[1][3]
    changed = LowerRank(whitened_factors(program, one.entries, ROWS[:2])).run(program)
    logits = [[Student(each).logits(ids, {}) for ids in ROWS[:2]] for each in (program, changed)]
    loss = sum(divergence(a, b) for a, b in zip(*logits, strict=True)) / 64
    assert one.loss == pytest.approx(loss, rel=1e-3)
    assert one.loss > 0
    for row in table.values():
        assert [len(set(entry.weight for entry in one.entries)) for one in row] == [0, *[7] * len(SHARES)]
        assert row[0].loss == 0.0
        assert row[1].loss < row[-1].loss
    monkeypatch.setattr(ranks_module, "_measure", lambda *_: pytest.fail("measured again"))
    assert scored(program) == table


def test_the_block_that_minds_less_gives_more(cache: Path) -> None:
    """By hand: two blocks of the same bytes, one loses ten times as much."""
    program = teacher()
    table = scored(program)
    made = {site: [Ranks(len(SHARES[:at]) * (10.0 if site else 1.0), one.entries) for at, one in enumerate(row)]
            for site, row in table.items()}  # fmt: skip
    source = 10**6
    least = sum(min(weight_bytes(program, one.entries) for one in row) for row in made.values())
    chosen = choose(program, made, source + least / 2, source)
    assert chosen[0].loss > 0
    assert weight_bytes(program, chosen[0].entries) < weight_bytes(program, chosen[1].entries)
    assert sum(weight_bytes(program, one.entries) for one in chosen) <= least / 2
    with pytest.raises(RecipeError, match=r"no ranks fit .* the least are [\d,]+; raise --weights"):
        choose(program, made, source + least - 1, source)


def test_a_plan_with_low_ranks_compiles_to_its_bytes_of_weights(cache: Path, tmp_path: Path) -> None:
    made = planner("75%")
    budget = Budget(made.source_bytes)
    chosen = made.best(budget, measurements=2)
    plan = made.plan(chosen, budget)
    figures = plan.figures
    assert figures is not None
    assert figures.weight_bytes is not None
    assert figures.source_weight_bytes is not None
    assert figures.weight_bytes <= 0.75 * figures.source_weight_bytes
    compiled = zoo.compile_again("llama", plan=plan.save(tmp_path / "plan.json"), tokens=0, calibration=ROWS[:2])
    own = sum(tensor.numel() * tensor.element_size() for tensor in compiled.graph_module.parameters())
    assert own == figures.weight_bytes
    assert Plan.load(tmp_path / "plan.json") == plan
    assert figures.predicted_loss == pytest.approx(sum(one.loss for one in made.ranks))
    source = zoo.compile_again("llama", "none", tokens=0)
    loss = sum(divergence(source(ids).logits, compiled(ids).logits) / ids.numel() for ids in ROWS[2:]) / 2
    assert figures.measured_loss == pytest.approx(loss, rel=1e-3)


def test_time_counts_the_thin_products(cache: Path) -> None:
    """By hand: 2 (in + out) r operations, and out, for 2 in out, in place of each product."""
    program = teacher()
    entry = next(one for one in scored(program)[0] if one.entries).entries[0]
    gone, come = saved_calls(program, [entry])
    out, width = dict(program.module.named_parameters())[entry.weight].shape
    assert [call.operations for call in gone] == [2 * out * width + out]
    assert [call.operations for call in come] == [2 * entry.rank * width + entry.rank, 2 * out * entry.rank + out]
    made, whole = planner("50%"), planner("")
    entries = made.entries(made.solve(Budget(made.source_bytes)))
    slow = H200.model_copy(update={"bandwidth": 1e6, "rate": 1e6})
    made.target = whole.target = slow
    assert made.seconds_of(entries) < whole.seconds_of(entries)


def test_a_budget_of_weights_is_in_bytes(cache: Path) -> None:
    with pytest.raises(RecipeError, match="weights take bytes, not '2ms'"):
        planner("2ms")
