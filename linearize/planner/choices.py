"""What a site can be planned to be, with its predicted loss: one candidate for all its kv heads, or one by head.

The loss of a site is that of its candidate, measured with the rest of the model as the source; where heads differ,
each head brings its share of its own candidate's loss, and sites add up. Sizes between two that were measured are
interpolated, log loss by log size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from linearize.plan import PlanEntry
from linearize.planner.candidates import SIZES, Candidate
from linearize.planner.scores import Scored
from linearize.planner.solver import Option, combine, frontier
from linearize.spec import Site

BETWEEN = (0.25, 0.5, 0.75)
TINY = 1e-9

Choice = tuple[Candidate, ...]  # a candidate for every kv head


@dataclass(frozen=True)
class Known:
    """A candidate at one site with its loss, whole and by kv head."""

    candidate: Candidate
    loss: float
    by_head: tuple[float, ...]


def known_candidates(site: Site, candidates: Sequence[Candidate], scored: Mapping[str, Scored]) -> list[Known]:
    """Those that were measured, and sizes between them."""
    found = []
    for one in candidates:
        row = scored.get(one.measured_as)
        if row is not None:
            found.append(Known(one, row.loss, tuple(row.loss * share for share in row.shares)))
    return [*found, *between(found)]


def between(found: Sequence[Known]) -> list[Known]:
    made = []
    sized = [one for one in found if one.candidate.size is not None]
    for low, high in pairwise(sized):
        if _family(low.candidate) == _family(high.candidate):
            made += [_interpolated(low, high, part) for part in BETWEEN]
    return made


def _family(one: Candidate) -> tuple[Any, ...]:
    rest = tuple(item for item in one.options if item[0] not in SIZES[one.mixer])
    return (one.mixer, rest)


def _interpolated(low: Known, high: Known, part: float) -> Known:
    name = SIZES[low.candidate.mixer][0]
    options, scored = (
        tuple(
            (key, _mean(value, dict(other)[key], part, whole=True) if key == name else value) for key, value in first
        )
        for first, other in (
            (low.candidate.options, high.candidate.options), (low.candidate.scored, high.candidate.scored),
        )
    )  # fmt: skip
    by_head = tuple(_mean(a, b, part) for a, b in zip(low.by_head, high.by_head, strict=True))
    return Known(replace(low.candidate, options=options, scored=scored), _mean(low.loss, high.loss, part), by_head)


def _mean(low: float, high: float, part: float, whole: bool = False) -> Any:
    """Geometric, `part` of the way."""
    value = math.exp((1 - part) * math.log(max(low, TINY)) + part * math.log(max(high, TINY)))
    return round(value) if whole else value


def site_options(site: Site, known: Sequence[Known], cost: Any, by_head: bool) -> list[Option]:
    """The frontier of what the site can be; `cost(site, choice)` is exact, and adds up over heads but for masks."""
    heads = site.attention.kv_heads
    found = [Option(one.loss, cost(site, (one.candidate,) * heads), (one.candidate,) * heads) for one in known]
    if by_head and heads > 1:
        parts = [_head_options(site, known, head, cost) for head in range(heads)]
        mixed = [option for option in combine(parts, tuple) if len(set(option.choice)) > 1]
        found += [Option(option.loss, cost(site, option.choice), option.choice) for option in mixed]
    return frontier(found)


def _head_options(site: Site, known: Sequence[Known], head: int, cost: Any) -> list[Option]:
    heads = site.attention.kv_heads
    single = [one for one in known if one.candidate.by_head]
    return frontier([
        Option(one.by_head[head], cost(site, (one.candidate,) * heads) / heads, one.candidate) for one in single
    ])  # fmt: skip


def entry_of(site: Site, choice: Choice, reason: str = "", scored: bool = False) -> PlanEntry:
    """The plan's line for a choice; with `scored`, at the sizes that it was measured with."""
    distinct = list(dict.fromkeys(choice))

    def options(one: Candidate) -> dict[str, Any]:
        given = one.scored if scored else one.options
        return {key: list(value) if isinstance(value, tuple) else value for key, value in given}

    if len(distinct) == 1:
        made = (distinct[0].mixer, options(distinct[0]))
    else:
        parts = [
            {"mixer": one.mixer, "kv_heads": [head for head, other in enumerate(choice) if other == one],
             "options": options(one)}
            for one in distinct
        ]  # fmt: skip
        made = ("mixture", {"parts": parts})
    return PlanEntry(site=site.index, module=site.module, mixer=made[0], options=made[1], reason=reason)
