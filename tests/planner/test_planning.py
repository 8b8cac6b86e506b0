"""Plans from scores: budgets kept, pins, heads that differ, measured choices, and the file compiled."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from linearize.errors import RecipeError
from linearize.plan import Plan
from linearize.planner.budgets import parse_budget, parse_context, parse_pin
from linearize.planner.candidates import Candidate
from linearize.planner.choices import Known, between, entry_of
from linearize.planner.make import Wishes, make_planner
from linearize.planner.pareto import curve, drawn, recipe_marks
from linearize.planner.planning import CLOSE, Budget, Planner
from linearize.planner.target import H200
from tests import zoo

LENGTH = 32


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Planner]:
    """A planner of the zoo's llama at 256 tokens; scores are measured once for all tests here."""
    cache = tmp_path_factory.mktemp("cache")
    rows = [zoo.tokens(1, LENGTH, seed) for seed in range(4)]

    def made(name: str = "llama", **wishes: Any) -> Planner:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("LINEARIZE_CACHE", str(cache))
            return make_planner(
                zoo.captured(name), 256, H200, data=rows, tokens=2 * LENGTH, wishes=Wishes(**wishes)
            )

    return made


def test_plans_keep_to_their_bytes_and_lose_less_with_more(make: Callable[..., Planner]) -> None:
    planner = make()
    losses = []
    for share in (0.2, 0.4, 0.7, 1.0):
        budget = Budget(share * planner.source_bytes)
        solution = planner.solve(budget)
        assert planner.bytes_of(solution) <= budget.limit
        losses.append(planner.predicted(solution))
    assert losses == sorted(losses, reverse=True)
    assert losses[0] > 0 == losses[-1]


def test_the_same_scores_give_the_same_plan(make: Callable[..., Planner]) -> None:
    planner, again = make(), make()
    budget = Budget(0.3 * planner.source_bytes, text="30%")
    assert planner.plan(planner.best(budget), budget) == again.plan(again.best(budget), budget)


def test_no_candidate_everywhere_is_predicted_better(make: Callable[..., Planner]) -> None:
    planner = make()
    budget = Budget(0.4 * planner.source_bytes)
    solution = planner.solve(budget)
    for uniform in planner.uniform():
        if planner.bytes_of(uniform) <= budget.limit:
            assert planner.predicted(solution) <= planner.predicted(uniform) + 1e-12


def test_what_is_chosen_measured_no_worse_than_the_solution(make: Callable[..., Planner]) -> None:
    planner = make()
    budget = Budget(0.3 * planner.source_bytes)
    solution, best = planner.solve(budget), planner.best(budget, measurements=4)
    assert planner.bytes_of(best) <= budget.limit
    one, other = planner.measure([solution, best])
    assert other <= one


def test_what_is_near_the_solution_fits_and_comes_most_promising_first(make: Callable[..., Planner]) -> None:
    planner = make()
    budget = Budget(0.3 * planner.source_bytes)
    solution = planner.solve(budget)
    near = planner.neighbours(solution, budget)
    assert solution in near
    assert len(near) == len({str(planner.entries(one)) for one in near}) > 3
    assert all(planner.bytes_of(one) <= budget.limit for one in near)
    losses = [planner.predicted(one) for one in near]
    assert losses == sorted(losses)
    assert losses[-1] <= CLOSE * planner.predicted(solution) + 1e-6


def test_pins_and_what_is_ruled_out_are_kept_to(make: Callable[..., Planner]) -> None:
    planner = make(pins={1: ("slots", {"slots": 16, "window": 4})}, never=("drop", "mla"), by_head=False)
    plan = planner.plan(planner.solve(Budget(0.5 * planner.source_bytes)), Budget(1.0))
    assert plan.entry(1).label() == "slots{slots=16,window=4}"
    assert plan.entry(1).reason.startswith("pinned")
    assert {one.mixer for one in planner.candidates[0]}.isdisjoint({"drop", "mla"})
    only = make(mixers=("window",))
    assert {one.mixer for one in only.candidates[0]} == {"window", "keep"}


def test_a_pin_that_cannot_be_is_refused(make: Callable[..., Planner]) -> None:
    with pytest.raises(RecipeError, match=r"pin of site 0: mixture: parts must take each of the 2 kv heads once"):
        make(pins={0: ("mixture", {"parts": [{"mixer": "keep", "kv_heads": [0]}]})})


def test_a_budget_below_the_cheapest_plan_says_what_that_takes(make: Callable[..., Planner]) -> None:
    planner = make(never=("drop",))
    with pytest.raises(RecipeError, match=r"no plan fits 1%: the cheapest takes [\d,.]+ bytes"):
        planner.solve(Budget(0.01 * planner.source_bytes, text="1%"))


def test_a_budget_of_time_is_kept_too(make: Callable[..., Planner]) -> None:
    planner = make()
    kept = planner.seconds_of(planner.entries(planner.solve(Budget(1e9))))
    budget = Budget(0.99 * kept, seconds=True)
    found = planner.solve(budget)
    assert planner.cost(found, budget) <= budget.limit
    assert any(entry.mixer != "keep" for entry in planner.entries(found))


def test_a_plan_compiles_and_allocates_what_it_says(make: Callable[..., Planner], tmp_path: Path) -> None:
    planner = make()
    budget = Budget(0.35 * planner.source_bytes, text="35%")
    plan = planner.plan(planner.best(budget, measurements=2), budget)
    compiled = zoo.compile_again("llama", plan=plan.save(tmp_path / "plan.json"), tokens=0)
    assert plan.figures is not None
    assert compiled.state_bytes(1, 256) == plan.figures.state_bytes <= budget.limit
    assert Plan.load(tmp_path / "plan.json") == plan


def test_heads_that_differ_become_a_mixture() -> None:
    site = zoo.captured("llama").matched[0]
    slots = Candidate("slots", (("slots", 8),), (("slots", 4),))
    entry = entry_of(site, (slots, Candidate("keep")))
    assert (entry.mixer, entry.options["parts"][0]["kv_heads"]) == ("mixture", [0])
    assert entry_of(site, (slots, slots), scored=True).options == {"slots": 4}


def test_sizes_between_two_are_interpolated() -> None:
    low, high = (
        Known(Candidate("slots", (("slots", size), ("window", 4)), (("slots", size),)), loss, np.array(effects))
        for size, loss, effects in ((16, 0.4, [[8.0, 0.0], [0.0, 1.0]]), (256, 0.1, [[2.0, 0.0], [4.0, 0.0]]))
    )
    made = between([low, Known(Candidate("keep"), 0.0, np.zeros((2, 2))), high])
    assert [dict(one.candidate.options)["slots"] for one in made] == [32, 64, 128]
    assert made[1].loss == pytest.approx(0.2)
    assert dict(made[1].candidate.options)["window"] == 4
    half = 2**0.5
    np.testing.assert_allclose(made[1].effects, [[4.0, 0.0], [half, half]])  # lengths 4 and 2, directions half-way


def test_a_sliding_window_of_the_source_is_exact_and_nothing_looks_further(make: Callable[..., Planner]) -> None:
    planner = make("mistral")
    solution = planner.solve(Budget(planner.source_bytes))
    assert planner.predicted(solution) == 0.0
    assert {entry.label() for entry in planner.entries(planner.solve(Budget(0.1 * planner.source_bytes)))} == {
        "window{window=6}"
    }


def test_the_curve_falls_and_recipes_stand_on_it(make: Callable[..., Planner]) -> None:
    planner = make(never=("drop",))
    marks = curve(planner, (0.01, 0.3, 0.6, 1.0), measurements=2)
    assert [mark.name for mark in marks] == ["30%", "60%", "100%"]
    losses = [mark.loss for mark in marks]
    assert losses == sorted(losses, reverse=True)
    others = recipe_marks(planner, ["none", "window", "slots"])
    assert others[0].bytes == planner.source_bytes
    assert others[0].loss == 0.0
    svg = drawn(marks, others, planner.source_bytes, "llama")
    assert svg.count("<circle") == 6
    assert "plan at 30%" in svg


@pytest.mark.parametrize(
    ("text", "limit", "seconds"),
    [("25%", 250.0, False), ("3KiB", 3072.0, False), ("12", 12.0, False), ("2.5 ms", 0.0025, True)],
)
def test_budgets_are_read(text: str, limit: float, seconds: bool) -> None:
    found = parse_budget(text, 1000)
    assert (found.limit, found.seconds, found.text) == (pytest.approx(limit), seconds, text)


@pytest.mark.parametrize("text", ["", "much", "0%", "5 parsecs", "-3MiB"])
def test_other_budgets_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"write 25%, 3MiB or 2\.5ms"):
        parse_budget(text, 1000)


def test_contexts_and_pins_are_read() -> None:
    assert (parse_context("4096"), parse_context("32k"), parse_context("1M")) == (4096, 32768, 2**20)
    assert parse_pin("0=keep") == (0, ("keep", {}))
    assert parse_pin("3=slots{slots=256,window=32}") == (3, ("slots", {"slots": 256, "window": 32}))
    for wrong in ("keep", "0:keep", "0=slots{slots}"):
        with pytest.raises(RecipeError, match=r"cannot read the (pin|mixer)"):
            parse_pin(wrong)
    with pytest.raises(RecipeError, match="cannot read the context"):
        parse_context("32 thousand")
