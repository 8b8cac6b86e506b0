"""Sites that read another's cache, in the choice: what one may become then depends on what another does.

A link says that site i reads the cache of site j. It costs next to nothing, but j must be kept, and i has no choice of
its own. Once a set of links is fixed the rest is the knapsack again, so what is to be found are sets worth solving for.
At a price p of a byte (or second) a site is worth v = min over its options of loss + p cost, and

    a hub j      loses   keep_j.loss + p keep_j.cost - v_j
    a link i->j  gains   v_i - (link.loss + p link.cost)

which is facility location: hubs are opened one by one, the one that gains most first, while one does, and every site
that is no hub takes its best link to one. p is that at which the options alone spend the budget, and some around it, as
links leave more to spend. Every set found is then solved for exactly, and so is none; of the best one also every set
with a link less, and with one of the `TRIED` next best more, as long as that is better, `ROUNDS` times at most.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from linearize.planner.solver import Option, solve

FACTORS = (2.0, 1.0, 0.5, 0.25, 0.1)
TRIED, ROUNDS = 4, 3
HALVINGS = 60
Items = Mapping[int, Sequence[Option]]


@dataclass(frozen=True)
class Link:
    """`site` reads the cache of `of`, and is `option` then."""

    site: int
    of: int
    option: Option


def solve_linked(
    items: Items, keeps: Mapping[int, Option], links: Sequence[Link], budget: float, forced: Sequence[Link] = ()
) -> list[dict[int, Option]]:
    """The option of every site under every set of links that is worth trying, the least loss first, none twice; []
    where nothing fits. `items` are what sites can be by themselves, `keeps` what they are where they are kept, for
    those that may be; `forced` links are in every set.
    """
    solved: dict[frozenset[Link], dict[int, Option] | None] = {}

    def attempt(chosen: Iterable[Link]) -> None:
        key = frozenset(chosen)
        if key not in solved:
            solved[key] = _solved(items, keeps, key, budget)

    for chosen in link_sets(items, keeps, links, budget, forced):
        attempt(chosen)
    for _ in range(ROUNDS if links else 0):
        best = min(solved, key=lambda key: (_loss(solved[key]), len(key)))
        if solved[best] is None:
            break
        for changed in _changes(best, links, forced):
            attempt(changed)
        if _loss(solved[best]) <= min(_loss(one) for one in solved.values()):
            break
    fitting = [one for _, one in sorted(solved.items(), key=lambda item: len(item[0])) if one is not None]
    return sorted(fitting, key=_loss)


def _solved(
    items: Items, keeps: Mapping[int, Option], links: Iterable[Link], budget: float
) -> dict[int, Option] | None:
    """With exactly these links; None where that does not fit."""
    given = {link.site: [link.option] for link in links} | {link.of: [keeps[link.of]] for link in links}
    rest = {site: given.get(site, item) for site, item in items.items()}
    places = solve(list(rest.values()), budget) if all(rest.values()) else None
    if places is None:
        return None
    return {site: item[at] for (site, item), at in zip(rest.items(), places, strict=True)}


def _loss(found: Mapping[int, Option] | None) -> float:
    return sum(option.loss for option in found.values()) if found is not None else float("inf")


def _changes(chosen: frozenset[Link], links: Sequence[Link], forced: Sequence[Link]) -> list[frozenset[Link]]:
    """A link less, or one of the next best more where it goes with the others."""
    hubs, sites = {link.of for link in chosen}, {link.site for link in chosen}
    others = [link for link in links if link.site not in hubs | sites and link.of not in sites]
    more = sorted(others, key=lambda link: (link.option.loss, link.site, link.of))[:TRIED]
    return [*(chosen - {link} for link in sorted(chosen, key=lambda link: link.site) if link not in forced),
            *(chosen | {link} for link in more)]  # fmt: skip


def link_sets(
    items: Items, keeps: Mapping[int, Option], links: Sequence[Link], budget: float, forced: Sequence[Link]
) -> list[tuple[Link, ...]]:
    """`forced` alone, and what is worth it at prices around that of the budget."""
    sets: list[tuple[Link, ...]] = [tuple(forced)]
    if links:
        priced = {site: _Item.of(item) for site, item in items.items() if item}
        price = price_of(list(priced.values()), budget)
        sets += [_worth(priced, keeps, links, forced, price * factor) for factor in FACTORS]
    return list(dict.fromkeys(sets))


@dataclass(frozen=True)
class _Item:
    losses: NDArray[np.float64]
    costs: NDArray[np.float64]

    @staticmethod
    def of(options: Sequence[Option]) -> _Item:
        return _Item(np.array([one.loss for one in options]), np.array([one.cost for one in options]))

    def worth(self, price: float) -> float:
        return float((self.losses + price * self.costs).min())

    def spends(self, price: float) -> float:
        return float(self.costs[(self.losses + price * self.costs).argmin()])


def price_of(items: Sequence[_Item], budget: float) -> float:
    """Of a unit of cost: the least, by halving, at which what is worth most fits the budget."""
    low, high = 0.0, 1.0
    while sum(item.spends(high) for item in items) > budget and high < 1e30:
        high *= 16
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(item.spends(middle) for item in items) > budget else (low, middle)
    return high


def _worth(
    items: Mapping[int, _Item], keeps: Mapping[int, Option], links: Sequence[Link], forced: Sequence[Link], price: float
) -> tuple[Link, ...]:
    """The links of the hubs that are opened at this price, by site."""
    worth = {site: item.worth(price) for site, item in items.items()}
    fixed = {link.site for link in forced}
    able = [link for link in links if link.site not in fixed and link.site in worth and link.of in worth]
    hub_costs = {of: keeps[of].loss + price * keeps[of].cost - worth[of] for of in {link.of for link in able}}
    gains = {link: worth[link.site] - link.option.loss - price * link.option.cost for link in able}

    def taken(hubs: set[int]) -> dict[int, Link]:
        best: dict[int, Link] = {}
        for link, gain in gains.items():
            known = best.get(link.site)
            if gain > 0 and link.of in hubs and link.site not in hubs and (known is None or gain > gains[known]):
                best[link.site] = link
        return best

    def value(hubs: set[int]) -> float:
        return sum(gains[link] for link in taken(hubs).values()) - sum(hub_costs.get(of, 0.0) for of in hubs - opened)

    opened = {link.of for link in forced}
    hubs = set(opened)
    while True:
        more = [(value(hubs | {of}), -of) for of in hub_costs if of not in hubs and of not in fixed]
        if not more or max(more)[0] <= value(hubs):
            return (*forced, *sorted(taken(hubs).values(), key=lambda link: link.site))
        hubs.add(-max(more)[1])
