"""Merging of full slots on CPU: the same function as `linearize.ops.slot_merge.merge`, with rows added by index.

Letters as there; N = B G heads in all, D = d + dv columns of an item x = [k ; v]. Slots and leaving tokens all exist
here, so every round removes the same number of items from each head and nothing has to be masked but the sinks.
Float32 keys without a metric go to `slots.c`, where a compiler could make it: 4 rounds in a tenth of the time.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from linearize.kernels.cpu.native import library
from linearize.ops.slot_merge import RESOLUTION, coarse, features

MOST_ITEMS = 2 * 65535  # C keeps an index in the 16 bits below a cost


def merge_full(
    x: Tensor,
    n: Tensor,
    key_dim: int,
    sizes: list[int],
    sinks: int,
    metric: Tensor | None = None,
    lam: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x [B,G,L,D], n [B,G,L], all counts positive -> means [B,G,C,D] and counts [B,G,C] of the last of `sizes`."""
    if metric is None and lam is None and x.dtype == torch.float32 and x.shape[2] <= MOST_ITEMS:
        native = library("slots")
        if native is not None:
            return _in_c(native, x.contiguous(), n.contiguous(), key_dim, sizes, sinks)
    return merge_by_index(x, n, key_dim, sizes, sinks, metric, lam)


def _in_c(
    native: ctypes.CDLL, x: Tensor, n: Tensor, key_dim: int, sizes: list[int], sinks: int
) -> tuple[Tensor, Tensor]:
    """`merge_full` by `slots.c`; writes to x and n."""
    (batch, heads, items, width), long = x.shape, ctypes.c_int64
    failed = native.merge_full(
        ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(n.data_ptr()), long(batch * heads), long(items), long(width),
        long(key_dim), (long * len(sizes))(*sizes), long(len(sizes)), long(sinks),
    )  # fmt: skip
    if failed:
        raise MemoryError("linearize: no memory to merge slots in")
    return x[:, :, : sizes[-1]], n[:, :, : sizes[-1]]


def merge_by_index(
    x: Tensor,
    n: Tensor,
    key_dim: int,
    sizes: list[int],
    sinks: int,
    metric: Tensor | None = None,
    lam: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`merge_full` by torch operators."""
    shape = x.shape[:2]
    n = n.flatten(0, 1)
    sums = x.flatten(0, 1) * n.unsqueeze(-1)
    for size in sizes:
        means = sums / n.unsqueeze(-1)
        y = means[..., :key_dim]
        if metric is not None or lam is not None:
            k, v = means.unflatten(0, shape).split([key_dim, means.shape[2] - key_dim], dim=-1)
            y = features(k, v, metric, lam).flatten(0, 1)
        sums, n = _round(sums, n, y, size, sinks)
    return (sums / n.unsqueeze(-1)).unflatten(0, shape), n.unflatten(0, shape)


def _round(sums: Tensor, n: Tensor, y: Tensor, size: int, sinks: int) -> tuple[Tensor, Tensor]:
    heads, items, width = sums.shape
    cost, partner = _costs(y, n, sinks).min(dim=-1)
    chosen = torch.sort(cost, dim=-1, stable=True)[1].narrow(1, 0, items - size)
    first = torch.arange(0, heads * items, items, device=n.device).unsqueeze(1)
    source = (2 * chosen).add_(first).view(-1)
    target = (2 * partner.gather(1, chosen)).add_(1).add_(first).view(-1)
    sums, n = sums.reshape(-1, width), n.reshape(-1)
    sums = sums.index_add(0, target, sums.index_select(0, source))
    n = n.index_add(0, target, n.index_select(0, source))
    kept = torch.ones_like(n, dtype=torch.bool).index_fill_(0, source, False).nonzero().view(-1)
    return sums.index_select(0, kept).view(heads, size, width), n.index_select(0, kept).view(heads, size)


def _costs(y: Tensor, n: Tensor, sinks: int) -> Tensor:
    """[N,ceil(L/2),floor(L/2)]: Ward's cost of each even item with each odd one."""
    y = y - y[:, 1::2].mean(dim=1, keepdim=True)
    even, odd = y[:, 0::2], y[:, 1::2]
    squares = torch.linalg.vecdot(y, y).mul_(1 - RESOLUTION)
    outer = squares[:, 0::2, None] + squares[:, None, 1::2]
    distance = outer.baddbmm_(even, odd.mT, alpha=-2).clamp_(min=0.0)
    inverse = n.reciprocal()
    costs = coarse(distance.div_(inverse[:, 0::2, None] + inverse[:, None, 1::2]))
    if sinks:
        costs[:, : (sinks + 1) // 2] = float("inf")
        costs[:, :, : sinks // 2] = float("inf")
    return costs
