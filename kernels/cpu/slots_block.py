"""`slots_block` and `slots_merge` on CPU.

A block's scores stay in cache: one product a block for all heads, the softmax in place, one product with the values.
Merging is `slots.c` where all slots are taken, standard operators otherwise (`linearize.kernels.cpu.slot_merge`).
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from linearize.kernels.cpu.native import expect, library, plain, run
from linearize.kernels.cpu.slot_merge import MOST_ITEMS, merge_full
from linearize.kernels.registry import Kernel, always, register
from linearize.ops._library import accumulation_dtype
from linearize.ops.hybrid import fold_heads
from linearize.ops.slot_merge import aged, round_sizes
from linearize.ops.slots_block import check_block
from linearize.ops.slots_merge import Slots, check_merge


def block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    mask: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `linearize.ops.slots_block`."""
    check_block(q, k, v, slot_k, slot_v, slot_n, mask, window)
    batch, length, heads, _ = q.shape
    kv_heads, count, dtype = k.shape[2], slot_n.shape[2], accumulation_dtype(q.dtype)
    o = q.new_empty(batch, length, heads, v.shape[3])
    lse = q.new_empty(batch, length, heads, dtype=dtype)
    bias = slot_n.to(dtype).log()[:, :, None]
    ahead = torch.ones(length, window + length, dtype=torch.bool).triu_(window + 1)
    for b in range(batch):
        keys, values = (
            torch.cat([slot[b].to(dtype), x[b].to(dtype).transpose(0, 1)], dim=1)
            for slot, x in ((slot_k, k), (slot_v, v))
        )
        scores = torch.bmm(fold_heads(q[b : b + 1].to(dtype), kv_heads)[0] * scale, keys.mT)
        by_head = scores.view(kv_heads, -1, length, keys.shape[1])
        by_head[..., :count] += bias[b, :, None]
        by_head[..., count:].masked_fill_(ahead if mask is None else ahead | ~mask[b], float("-inf"))
        top = scores.amax(dim=-1, keepdim=True).clamp_(min=torch.finfo(dtype).min)
        mass = scores.sub_(top).exp_().sum(dim=-1, keepdim=True)
        mixed = torch.bmm(scores, values).div_(mass.clamp(min=torch.finfo(dtype).tiny))
        o[b].copy_(mixed.view(heads, length, -1).transpose(0, 1))
        lse[b].copy_((mass.log_() + top).view(heads, length).t())
    return o, lse


def merge_slots(
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    k: Tensor,
    v: Tensor,
    metric: Tensor | None = None,
    lam: Tensor | None = None,
    *,
    sinks: int = 0,
    rounds: int = 1,
    decay: float = 1.0,
) -> Slots:
    """See `linearize.ops.slots_merge`; all slots are taken."""
    check_merge(slot_k, slot_v, slot_n, k, v, sinks)
    native = library("slots") if metric is None and lam is None and slot_k.dtype == k.dtype == torch.float32 else None
    if native is not None and slot_n.shape[2] + k.shape[1] <= MOST_ITEMS:
        return _merge_in_c(native, (slot_k, slot_v, slot_n, k, v), sinks, rounds, decay)
    dtype, count, key_dim = accumulation_dtype(slot_k.dtype), slot_n.shape[2], slot_k.shape[3]
    old, new = torch.cat([slot_k, slot_v], -1).to(dtype), torch.cat([k, v], -1).to(dtype).transpose(1, 2)
    n = torch.cat([aged(slot_n.to(dtype), sinks, decay), torch.ones_like(new[..., 0])], dim=2)
    sizes = round_sizes(n.shape[2], count, sinks, rounds)
    x, n = merge_full(torch.cat([old, new], dim=2), n, key_dim, sizes, sinks, metric, lam)
    return x[..., :key_dim].contiguous(), x[..., key_dim:].contiguous(), n.contiguous()


def _merge_in_c(native: ctypes.CDLL, tensors: tuple[Tensor, ...], sinks: int, rounds: int, decay: float) -> Slots:
    slot_k, slot_v, _, k, _ = tensors
    (batch, kv_heads, count, key_dim), value_dim, block = slot_k.shape, slot_v.shape[3], k.shape[1]
    slots, tokens = (batch, kv_heads, count), (batch, block, kv_heads)
    shapes = ((*slots, key_dim), (*slots, value_dim), slots, (*tokens, key_dim), (*tokens, value_dim))
    expect("slots_merge", list(zip(tensors, shapes, strict=True)))
    outputs = torch.empty(shapes[0]), torch.empty(shapes[1]), torch.empty(shapes[2])
    sizes = round_sizes(count + block, count, sinks, rounds)
    numbers = (batch, kv_heads, key_dim, value_dim, block, count, sinks, len(sizes), *sizes)
    if run(native.slots_merge, (*map(plain, tensors), *outputs), numbers, (decay,)):
        raise MemoryError("linearize::slots_merge: no memory to merge slots in")
    return outputs


def _check_full(slot_k: Tensor, slot_v: Tensor, slot_n: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if bool((slot_n > 0).all()) else "a slot is empty"


SLOTS_BLOCK = register(Kernel("cpu.slots_block", "slots_block", "cpu", 10, always, block))
SLOTS_MERGE = register(Kernel("cpu.slots_merge", "slots_merge", "cpu", 10, _check_full, merge_slots))
