"""The solver against trying everything, its ties, and budgets that nothing fits."""

from __future__ import annotations

import itertools
import random

import numpy as np

from linearize.planner.solver import Option, frontier, solve, thinned_places


def everything(items: list[list[Option]], budget: float) -> float:
    """The least loss of all combinations that fit."""
    fitting = [one for one in itertools.product(*items) if sum(option.cost for option in one) <= budget]
    return min(sum(option.loss for option in one) for one in fitting)


def drawn(generator: random.Random, sites: int, candidates: int) -> list[list[Option]]:
    """Options like a model's: what costs more loses less, nearly."""
    return [
        [Option(2.0 ** -(cost / 40) * generator.uniform(0.5, 2), float(cost))
         for cost in sorted(generator.randrange(1, 400) for _ in range(candidates))]
        for _ in range(sites)
    ]  # fmt: skip


def test_it_finds_what_trying_everything_finds() -> None:
    generator = random.Random(0)
    for trial in range(40):
        items = drawn(generator, 4, 5)
        cheapest = sum(min(option.cost for option in item) for item in items)
        budget = cheapest + generator.uniform(0, 900)
        chosen = solve(items, budget)
        assert chosen is not None
        picked = [item[at] for item, at in zip(items, chosen, strict=True)]
        assert sum(option.cost for option in picked) <= budget
        assert sum(option.loss for option in picked) <= everything(items, budget) * 1.001 + 1e-12, trial


def test_a_budget_that_only_the_cheapest_fit_is_met_though_rounding_says_no() -> None:
    items = [[Option(1.0, 1 / 3), Option(0.5, 1.0)]] * 7
    chosen = solve(items, sum(item[0].cost for item in items))
    assert chosen == [0] * 7


def test_what_rounding_left_is_spent() -> None:
    items = [[Option(1.0, 10.4), Option(0.1, 11.4)]] * 3
    chosen = solve(items, 3 * 11.4, steps=4)
    assert chosen == [1, 1, 1]


def test_nothing_fits() -> None:
    assert solve([[Option(0.0, 5.0)], [Option(0.0, 6.0)]], 10.0) is None


def test_equal_losses_are_decided_by_order_each_time() -> None:
    items = [[Option(1.0, 1.0, "a"), Option(0.0, 5.0, "b"), Option(0.0, 5.0, "c")]] * 4
    assert solve(items, 12.0) == solve(items, 12.0) == solve(list(items), 12.0)
    assert [at for at in solve(items, 100.0) or []] == [1] * 4


def test_a_large_model_keeps_to_its_budget() -> None:
    items = drawn(random.Random(1), 64, 96)
    chosen = solve(items, 9000.0)
    assert chosen is not None
    assert sum(item[at].cost for item, at in zip(items, chosen, strict=True)) <= 9000.0


def test_the_frontier_leaves_out_what_is_beaten() -> None:
    pairs = [(1.0, 3.0), (2.0, 2.0), (2.5, 2.5), (0.5, 9.0), (2.0, 2.0), (0.5, 10.0)]
    options = [Option(loss, cost) for loss, cost in pairs]
    assert [(one.loss, one.cost) for one in frontier(options)] == [(2.0, 2.0), (1.0, 3.0), (0.5, 9.0)]


def test_a_long_frontier_is_thinned_with_the_ends_kept() -> None:
    costs = np.arange(1.0, 178.0)
    kept = thinned_places(costs, most=20)
    assert len(kept) <= 20
    assert (kept[0], kept[-1]) == (0, 176)
    assert (np.diff(kept) > 0).all()
    assert np.diff(kept)[-1] > 10 * np.diff(kept)[0]  # evenly by logarithm
    assert (thinned_places(costs[:5], most=20) == np.arange(5)).all()
