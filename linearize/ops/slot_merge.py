"""Bring a set of weighted key-value items back to C of them: bipartite Ward merging, deterministic.

    cost(a, b) = n_a n_b / (n_a + n_b) |y_a - y_b|^2        y = [k M ; sqrt(lam) v], M [G,d,e], lam [G]; y = k without

the growth of the summed squared distance to the mean (Ward 1963). With M M^T = E[q q^T] it is the expected squared
change of a logit. A round splits the items by the parity of their index (Bolya et al. 2023, ToMe, without their fixed
share): each even item finds its cheapest odd partner, and the cheapest of them merge until `size` are left. Item j has
count n_j; 0 marks an empty place. The first `sinks` items that exist never merge. Order is kept; ties go to the lower
index; |y_a - y_b|^2 below `RESOLUTION` of |y_a|^2 + |y_b|^2 is 0, and costs are compared as bfloat16: equal keys, and
equal words at equal distances under a rotation, then tie in every form, whatever its rounding (without: another pair
in 1 of 60 random sequences of 150 tokens).

Means are differentiable in keys and values; which items merge is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

RESOLUTION = 1e-6


def round_sizes(items: int, slots: int, sinks: int, rounds: int) -> list[int]:
    """How many items are left after each round: `rounds` nearly equal steps, and more where half is not enough."""
    sizes = []
    while items > slots:
        most = (items + 1) // 2 - (sinks + 1) // 2  # even items that may merge, however the sinks lie
        items = items - min(most, -(-(items - slots) // max(rounds, 1)))  # not in place: a trace has tensors for sizes
        rounds -= 1
        sizes.append(items)
    return sizes


def features(k: Tensor, v: Tensor, metric: Tensor | None = None, lam: Tensor | None = None) -> Tensor:
    """y [B,G,L,E] of k [B,G,L,d], v [B,G,L,dv]: what distances are taken of."""
    y = k if metric is None else k @ metric.to(k.dtype)
    return y if lam is None else torch.cat([y, v * lam.to(v.dtype).sqrt()[:, None, None]], dim=-1)


def aged(n: Tensor, sinks: int, decay: float) -> Tensor:
    """Counts [B,G,C] as a block joins them: once all slots are taken, `decay` of them, the sinks' excepted."""
    if decay == 1.0:
        return n
    sink = torch.arange(n.shape[2], device=n.device) < sinks
    return torch.where(sink | (n[:, :, -1:] == 0), n, n * decay)


def merge(k: Tensor, v: Tensor, n: Tensor, y: Tensor, sizes: list[int], sinks: int) -> tuple[Tensor, Tensor, Tensor]:
    """k [B,G,L,d], v [B,G,L,dv], n [B,G,L], y [B,G,L,E] -> the same of the last size in `sizes`, standard operators."""
    y = y.detach()
    for size in sizes:
        place = places(y, n.detach(), size, sinks)
        target = torch.arange(size, device=n.device)[:, None]
        weights = (place.unsqueeze(-2) == target).to(n.dtype) * n.unsqueeze(-2)
        n = weights.sum(dim=-1)
        weights = weights / n.masked_fill(n == 0, 1.0).unsqueeze(-1)
        k, v, y = weights @ k, weights @ v, weights.detach() @ y
    return k, v, n


def places(y: Tensor, n: Tensor, size: int, sinks: int) -> Tensor:
    """int64 [B,G,L]: the new index of each item, `size` for empty ones. y [B,G,L,E], n [B,G,L]."""
    exists = n > 0
    free = exists & (torch.cumsum(exists.to(torch.int64), dim=-1) > sinks)
    even, odd = slice(0, None, 2), slice(1, None, 2)
    allowed = free[..., even, None] & free[..., None, odd]
    costs = ward(y[..., even, :], y[..., odd, :], n[..., even], n[..., odd])
    cost, partner = costs.masked_fill(~allowed, float("inf")).min(dim=-1)
    index = torch.arange(cost.shape[-1], device=n.device)
    mine, other = cost.unsqueeze(-1), cost.unsqueeze(-2)
    before = (other < mine) | ((other == mine) & (index < index[:, None]))
    excess = exists.sum(dim=-1, keepdim=True) - size
    goes = (before.sum(dim=-1) < excess) & (cost < float("inf"))
    gone = interleave(goes, torch.zeros_like(free[..., odd]))
    stays = exists & ~gone
    place = torch.cumsum(stays.to(torch.int64), dim=-1) - 1
    joined = place.gather(-1, 2 * partner + 1)
    joined = interleave(joined, torch.zeros_like(place[..., odd]))
    return torch.where(stays, place, torch.where(gone, joined, size))


def ward(y_a: Tensor, y_b: Tensor, n_a: Tensor, n_b: Tensor) -> Tensor:
    """Costs [..,A,B] of y_a [..,A,E], n_a [..,A] with y_b [..,B,E], n_b [..,B]; finite where a count is 0."""
    centre = y_b.mean(dim=-2, keepdim=True)  # distances do not see it, but rounding does
    y_a, y_b = y_a - centre, y_b - centre
    squares = y_a.square().sum(dim=-1).unsqueeze(-1) + y_b.square().sum(dim=-1).unsqueeze(-2)
    distance = (squares * (1 - RESOLUTION) - 2 * (y_a @ y_b.transpose(-1, -2))).clamp(min=0.0)
    both = n_a.unsqueeze(-1) + n_b.unsqueeze(-2)
    return coarse(distance * (n_a.unsqueeze(-1) * n_b.unsqueeze(-2) / both.masked_fill(both == 0, 1.0)))


def coarse(cost: Tensor) -> Tensor:
    """What is compared of a cost: 8 bits of it, so that rounding seldom decides."""
    return cost.to(torch.bfloat16).to(cost.dtype)


def interleave(even: Tensor, odd: Tensor) -> Tensor:
    """[..,ceil(L/2)] and [..,floor(L/2)] -> [..,L]."""
    length = even.shape[-1] + odd.shape[-1]
    index = torch.arange(length, device=even.device)
    order = torch.div(index, 2, rounding_mode="floor") + (index % 2) * even.shape[-1]
    return torch.cat([even, odd], dim=-1).index_select(-1, order)


def merge_one_by_one(
    k: Tensor, v: Tensor, n: Tensor, y: Tensor, sizes: list[int], sinks: int
) -> tuple[Tensor, Tensor, Tensor]:
    """`merge` of one head, k [L,d], v [L,dv], n [L], y [L,E], as the text says it: the truth of the tests."""
    items: list[tuple[Tensor, ...] | None] = [
        (k[j], v[j], n[j], y[j].detach()) if n[j] > 0 else None for j in range(len(n))
    ]
    for size in sizes:
        excess = sum(item is not None for item in items) - size
        free = [j for j, item in enumerate(items) if item is not None][sinks:]
        offers = []
        for a in (j for j in free if j % 2 == 0):
            costs = [(_cost(items[a], items[b]), b) for b in free if b % 2 == 1]
            offers += [(*min(costs), a)] if costs else []
        for _, b, a in sorted(offers, key=lambda offer: (offer[0], offer[2]))[: max(excess, 0)]:
            items[b] = _joined(items[a], items[b])
            items[a] = None
        kept = [item for item in items if item is not None]
        assert len(kept) <= size, "merging did not reach its size"
        items = [*kept, *([None] * (size - len(kept)))]
    empty = torch.zeros_like(k[0]), torch.zeros_like(v[0]), torch.zeros_like(n[0])
    k, v, n = (torch.stack(part) for part in zip(*[empty if i is None else i[:3] for i in items], strict=True))
    return k, v, n


def _cost(a: tuple[Tensor, ...] | None, b: tuple[Tensor, ...] | None) -> float:
    assert a is not None
    assert b is not None
    distance = (a[3] - b[3]).square().sum()
    return float(coarse(distance * a[2] * b[2] / (a[2] + b[2])))


def _joined(a: tuple[Tensor, ...] | None, b: tuple[Tensor, ...] | None) -> tuple[Tensor, ...]:
    assert a is not None
    assert b is not None
    n = a[2] + b[2]
    k, v, y = ((a[2] * a[i] + b[2] * b[i]) / n for i in (0, 1, 3))
    return k, v, n, y
