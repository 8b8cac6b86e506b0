"""What a site can be planned to be, with its predicted loss: one candidate for all its kv heads, or one by head.

The loss of a site with one candidate is measured, with the rest of the model as the source. Where heads differ, errors
of heads add up or cancel. With b_hc the effects of candidate c at head h (`sensitivity`), to second order

    Q(c(1), .., c(G)) = sum_h 1/2 |b_{h,c(h)}|^2 + (1 - SHRUNK) sum_{h < k} b_{h,c(h)} . b_{k,c(k)}

Lengths are exact, angles from a sketch, and shrunk for that. What is beyond second order is known where all heads have
one candidate: r_c, its measured loss over Q. A mixture has as much of it, in logarithms, as it has of those candidates:

    loss = Q prod_h r_{c(h)}^(s u_h),   u_h = |b_{h,c(h)}|^2 / sum,   s = (1 - sum_h u_h^2) G / (G - 1)

where s is 0 if a single head loses anything and 1 if all lose the same. Sites add up.

Sizes between two that were measured are interpolated: losses and lengths of effects geometrically, by log size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from linearize.plan import PlanEntry
from linearize.planner.candidates import SIZES, Candidate
from linearize.planner.heads import mixtures
from linearize.planner.scores import Scored
from linearize.planner.solver import Option, frontier
from linearize.spec import Site

BETWEEN = (0.25, 0.5, 0.75)
TINY = 1e-9
SHRUNK = 0.2
BEYOND = 4.0  # second order is trusted within such a factor

Choice = tuple[Candidate, ...]  # a candidate for every kv head
Effects = NDArray[np.float64]  # [G, K]


@dataclass(frozen=True)
class Known:
    """A candidate at one site with its loss. `effects` [G, K] are the vectors b_h, their inner products shrunk."""

    candidate: Candidate
    loss: float
    effects: Effects = field(compare=False)

    @cached_property
    def beyond(self) -> float:
        """log r: its measured loss over that to second order."""
        ratio = max(self.loss, TINY) / max(half_square(self.effects), TINY)
        return math.log(min(max(ratio, 1 / BEYOND), BEYOND))


def known_candidates(site: Site, candidates: Sequence[Candidate], scored: Mapping[str, Scored]) -> list[Known]:
    """Those that were measured, and sizes between them."""
    found = []
    for one in candidates:
        row = scored.get(one.measured_as)
        if row is not None:
            found.append(Known(one, row.loss, shrunk(np.array(row.effects), np.array(row.heads))))
    return [*found, *between(found)]


def shrunk(sketch: Effects, heads: Effects) -> Effects:
    """[G, K + G] of a sketch [G, K]: half the squared lengths are `heads` [G], inner products of different heads are
    multiplied by 1 - SHRUNK, by an own entry for every head."""
    lengths = np.sqrt(2 * heads)
    scaled = with_lengths(sketch, lengths)
    return np.hstack([math.sqrt(1 - SHRUNK) * scaled, np.diag(math.sqrt(SHRUNK) * lengths)])


def with_lengths(effects: Effects, lengths: Effects) -> Effects:
    """The same directions."""
    now = np.linalg.norm(effects, axis=1)
    return effects * (lengths / np.maximum(now, TINY))[:, None]


def half_square(effects: Effects) -> float:
    """Q of one row for every head."""
    return 0.5 * float(np.square(effects.sum(0)).sum())


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
            (key, round(_mean(value, dict(other)[key], part)) if key == name else value) for key, value in first
        )
        for first, other in (
            (low.candidate.options, high.candidate.options), (low.candidate.scored, high.candidate.scored),
        )
    )  # fmt: skip
    effects = _between_effects(low.effects, high.effects, part)
    return Known(replace(low.candidate, options=options, scored=scored), _mean(low.loss, high.loss, part), effects)


def _mean(low: float, high: float, part: float) -> float:
    """Geometric, `part` of the way."""
    return math.exp((1 - part) * math.log(max(low, TINY)) + part * math.log(max(high, TINY)))


def _between_effects(low: Effects, high: Effects, part: float) -> Effects:
    """Of every head the direction `part` of the way, and the geometric mean of the lengths."""
    one, other = np.linalg.norm(low, axis=1), np.linalg.norm(high, axis=1)
    turned = (1 - part) * with_lengths(low, np.ones_like(one)) + part * with_lengths(high, np.ones_like(other))
    least = math.sqrt(2 * TINY)
    return with_lengths(turned, np.maximum(one, least) ** (1 - part) * np.maximum(other, least) ** part)


def mixture_loss(known: Mapping[Candidate, Known], choice: Choice) -> float:
    """Of a site whose head h becomes choice[h]."""
    taken = [known[one] for one in choice]
    if len(set(choice)) == 1:
        return taken[0].loss
    effects = np.stack([one.effects[head] for head, one in enumerate(taken)])
    squares = np.square(effects).sum(1)
    shares = squares / max(squares.sum(), TINY**2)
    spread = (1 - np.square(shares).sum()) * len(shares) / (len(shares) - 1)
    beyond = sum(share * one.beyond for share, one in zip(shares, taken, strict=True))
    return half_square(effects) * math.exp(spread * beyond)


def site_options(site: Site, known: Sequence[Known], cost: Any, by_head: bool) -> list[Option]:
    """The frontier of what the site can be; `cost(site, choice)` is exact, and adds up over heads but for masks."""
    heads = site.attention.kv_heads
    costs = [cost(site, (one.candidate,) * heads) for one in known]
    found = [Option(one.loss, of_all, (one.candidate,) * heads) for one, of_all in zip(known, costs, strict=True)]
    single = [at for at, one in enumerate(known) if one.candidate.by_head]
    if by_head and heads > 1 and len(single) > 1:
        effects = np.stack([known[at].effects for at in single], 1)
        rows = mixtures(effects, np.array([costs[at] / heads for at in single]))
        choices = [tuple(known[single[at]].candidate for at in row) for row in rows]
        by_candidate = {one.candidate: one for one in known}
        mixed = [choice for choice in choices if len(set(choice)) > 1]
        found += [Option(mixture_loss(by_candidate, choice), cost(site, choice), choice) for choice in mixed]
    return frontier(found)


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
