"""Which candidate every kv head of a layer takes, where their losses do not add up.

With vectors b_hc [K] of candidate c at head h and w_c what it costs, for every price p of a geometric grid a choice

    min over c(1), .., c(G) of  1/2 |sum_h b_{h,c(h)}|^2 + p sum_h w_{c(h)}

is looked for by coordinate descent (one head at a time, the others as they are) from what is best if losses added up,
and from what is best with one candidate for all. Choices that differ by one head from those, or from one candidate for
all, fill the frontier between them. All prices go at once, on the Gram matrix of the vectors; ties go to the earlier
candidate.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from linearize.planner.solver import thinned_places

PRICES, DECADES = 48, 8.0
SWEEPS = 12
MOST = 96

Vectors = NDArray[np.float64]
Places = NDArray[np.int64]


def mixtures(vectors: Vectors, costs: Vectors, most: int = MOST) -> Places:
    """[n, G], n <= `most`: a candidate's number for every head, on the frontier of loss and cost, cheapest first.

    vectors [G, C, K], costs [C] of one head.
    """
    heads, count, _ = vectors.shape
    flat = vectors.reshape(heads * count, -1)
    gram = (flat @ flat.T).reshape(heads, count, heads, count)
    prices = _prices(gram, costs)
    starts = _starts(gram, costs, prices)
    descended = [_descended(gram, costs, prices, start) for start in starts]
    alike = np.repeat(np.arange(count)[:, None], heads, axis=1)
    found = np.unique(np.concatenate([*descended, alike]), axis=0)
    losses, spent = _around(gram, costs, found)
    kept = _frontier(losses.ravel(), spent.ravel())
    kept = kept[thinned_places(spent.ravel()[kept], most)]
    choice, head, candidate = np.unravel_index(kept, losses.shape)
    rows = found[choice]
    rows[np.arange(len(rows)), head] = candidate
    return rows


def _prices(gram: Vectors, costs: Vectors) -> Vectors:
    """Geometric, from where only the cost counts to where only the loss does."""
    span = float(costs.max() - costs.min())
    largest = 0.5 * float(np.abs(gram).max()) * gram.shape[0]
    top = 10 * largest / span if span > 0 and largest > 0 else 1.0
    return top * np.logspace(0, -DECADES, PRICES)


def _starts(gram: Vectors, costs: Vectors, prices: Vectors) -> list[Places]:
    """[P, G] each: every head by itself, and one candidate for all."""
    heads = gram.shape[0]
    alone = 0.5 * np.einsum("hchc->hc", gram)
    together = 0.5 * np.einsum("hcgc->c", gram)
    single = (alone[None] + prices[:, None, None] * costs).argmin(2)
    same = (together + heads * prices[:, None] * costs).argmin(1)
    return [single, np.repeat(same[:, None], heads, axis=1)]


def _descended(gram: Vectors, costs: Vectors, prices: Vectors, start: Places) -> Places:
    """[P, G]: `start` after sweeps over its heads until none changes, `SWEEPS` at most."""
    chosen, own, against = start.copy(), 0.5 * np.einsum("hchc->hc", gram), _against(gram, start)
    for _ in range(SWEEPS):
        before = chosen.copy()
        for head in range(gram.shape[0]):
            others = against[head] - gram[head][:, head, chosen[:, head]]
            best = (others.T + own[head] + prices[:, None] * costs).argmin(1)
            against += gram[:, :, head, best] - gram[:, :, head, chosen[:, head]]
            chosen[:, head] = best
        if (chosen == before).all():
            break
    return chosen


def _against(gram: Vectors, chosen: Places) -> Vectors:
    """[G, C, n]: b_hc . sum of the vectors that each of `chosen` [n, G] takes."""
    total = np.zeros((*gram.shape[:2], len(chosen)))
    for head in range(gram.shape[0]):
        total += gram[:, :, head, chosen[:, head]]
    return total


def _around(gram: Vectors, costs: Vectors, chosen: Places) -> tuple[Vectors, Vectors]:
    """Loss and cost [n, G, C] of each of `chosen` [n, G] with one head changed to one candidate."""
    places, heads = np.arange(len(chosen)), np.arange(gram.shape[0])
    own, against = 0.5 * np.einsum("hchc->hc", gram), _against(gram, chosen).transpose(2, 0, 1)
    whole = 0.5 * sum(against[places, head, chosen[:, head]] for head in heads)
    losses = np.empty(against.shape)
    for head in heads:
        here = chosen[:, head]
        loss = against[:, head] - gram[head, here, head] + own[head]  # [n, C]: of the head, with the others as they are
        losses[:, head] = loss + (whole - loss[places, here])[:, None]
    spent = costs[chosen].sum(1)[:, None, None] - costs[chosen][:, :, None] + costs
    return losses, spent


def _frontier(losses: Vectors, costs: Vectors) -> Places:
    """Places of those that none beats in both, cheapest first."""
    order = np.lexsort((losses, costs))
    lowest = np.minimum.accumulate(np.concatenate([[np.inf], losses[order][:-1]]))
    return order[losses[order] < lowest]
