"""`mla_decode` on CPU: two batched products over the cache as it lies, no copy of it."""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.registry import Kernel, register
from linearize.ops.mla_decode import check_mla


def decode(q: Tensor, cache: Tensor, lens: Tensor | None = None, *, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """See `linearize.ops.mla_decode`; columns beyond the longest row are not read."""
    check_mla(q, cache, lens, rank)
    if lens is not None:
        counts = lens.tolist()
        cache = cache[:, : max(counts, default=0)]
    scores = torch.bmm(q, cache.transpose(1, 2)).mul_(scale)
    if lens is not None and min(counts) < cache.shape[1]:
        column = torch.arange(cache.shape[1])
        scores.masked_fill_((column >= lens[:, None])[:, None], float("-inf"))
    top = scores.amax(dim=-1, keepdim=True)
    weights = scores.sub_(top).exp_()
    mass = weights.sum(dim=-1, keepdim=True)
    o = torch.bmm(weights, cache[..., :rank]).div_(mass)
    return o, (mass.log_() + top).squeeze(-1)


def declines(q: Tensor, cache: Tensor, lens: Tensor | None = None, *args: object, **kwargs: object) -> str | None:
    if q.dtype != cache.dtype or q.dtype not in (torch.float32, torch.float64):
        return f"q is {q.dtype}, the cache {cache.dtype}: float32 or float64, both alike"
    if cache.shape[1] == 0 or (lens is not None and int(lens.min()) < 1):
        return "a row has no tokens"
    return None


MLA_DECODE = register(Kernel("cpu.mla_decode", "mla_decode", "cpu", 10, declines, decode))
