"""Choose one option an item so that the summed loss is least and the summed cost stays within a budget.

Multiple-choice knapsack, exactly but for the costs' rounding: with costs in `STEPS` units of the budget, rounded up,

    best[i][c] = min over options o of item i with cost o <= c of best[i-1][c - cost o] + loss o

and the budget that the rounding left unused is spent afterwards, swap by swap, as long as one lowers the loss. Ties
go to the earlier option, so the same numbers give the same choice. No search tree, no solver: a 32-layer model with 8
candidates a layer takes well under a second.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS = 4096


@dataclass(frozen=True)
class Option:
    """One choice for an item: what it loses (nats a token), what it costs (bytes or seconds), and what it is."""

    loss: float
    cost: float
    choice: Any = None


def solve(items: Sequence[Sequence[Option]], budget: float, steps: int = STEPS) -> list[int] | None:
    """The index of the option of every item; None where not even the cheapest ones fit."""
    cheapest = [min(range(len(item)), key=lambda at: (item[at].cost, item[at].loss)) for item in items]
    if sum(item[at].cost for item, at in zip(items, cheapest, strict=True)) > budget:
        return None
    found = _table(items, budget, steps)
    return _spend(items, found if found is not None else cheapest, budget)


def _table(items: Sequence[Sequence[Option]], budget: float, steps: int) -> list[int] | None:
    """The choice under rounded costs; None where rounding alone makes it infeasible."""
    unit = budget / steps if budget > 0 else 1.0
    best = np.zeros(steps + 1)
    taken = []
    for item in items:
        rows = np.full((len(item), steps + 1), np.inf)
        for at, option in enumerate(item):
            units = math.ceil(option.cost / unit - 1e-9)
            if units <= steps:
                rows[at, units:] = best[: steps + 1 - units] + option.loss
        taken.append(rows.argmin(0))
        best = rows.min(0)
    if not np.isfinite(best[steps]):
        return None
    left, chosen = steps, []
    for item, choice in zip(reversed(items), reversed(taken), strict=True):
        at = int(choice[left])
        chosen.append(at)
        left -= math.ceil(item[at].cost / unit - 1e-9)
    return chosen[::-1]


def _spend(items: Sequence[Sequence[Option]], chosen: list[int], budget: float) -> list[int]:
    """Swap single options, the one with the largest gain first, while the true costs allow it."""
    chosen = list(chosen)
    while True:
        spent = sum(item[at].cost for item, at in zip(items, chosen, strict=True))
        best = (0.0, 0, 0)
        for number, (item, at) in enumerate(zip(items, chosen, strict=True)):
            for other, option in enumerate(item):
                gain = item[at].loss - option.loss
                if gain > best[0] and spent - item[at].cost + option.cost <= budget:
                    best = (gain, number, other)
        if not best[0]:
            return chosen
        chosen[best[1]] = best[2]


def frontier(options: Sequence[Option]) -> list[Option]:
    """Those that no other beats in both loss and cost, cheapest first."""
    kept: list[Option] = []
    for option in sorted(options, key=lambda one: (one.cost, one.loss)):
        if not kept or option.loss < kept[-1].loss:
            kept.append(option)
    return kept


def thinned_places(costs: NDArray[np.float64], most: int) -> NDArray[np.int64]:
    """Places of at most `most` of ascending costs, evenly by logarithm, first and last included."""
    if len(costs) <= most:
        return np.arange(len(costs))
    logs = np.log(np.maximum(costs, 1e-12))
    marks = np.linspace(logs[logs > np.log(1e-12)][0], logs[-1], most - 1)
    return np.unique([0, len(costs) - 1, *(int(np.abs(logs - mark).argmin()) for mark in marks)])
