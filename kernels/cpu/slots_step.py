"""`slots_chunk` on CPU for one token: `slots.c`, one call for rings, softmax, slots, and the merge at a block's end."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from linearize.kernels.cpu.native import expect, library, missing, plain, run
from linearize.kernels.registry import Kernel, register
from linearize.ops.slot_merge import round_sizes
from linearize.ops.slots import Outputs, check_slots


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    before: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    *,
    window: int,
    scale: float,
    sinks: int = 0,
    rounds: int = 1,
    decay: float = 1.0,
) -> Outputs:
    """See `linearize.ops.slots`."""
    (batch, _, heads, key_dim), (kv_heads, value_dim), count = q.shape, v.shape[2:], slot_n.shape[2]
    if heads % kv_heads or count < max(1, 2 * sinks):
        check_slots(q, k, v, mask, before, (ring_k, ring_v), (slot_k, slot_v, slot_n), window, sinks)
    ring, slots, token = (batch, 2 * window, kv_heads), (batch, kv_heads, count), (batch, 1, kv_heads)
    inputs = (
        (q, (batch, 1, heads, key_dim)), (k, (*token, key_dim)), (v, (*token, value_dim)),
        (mask, (batch, 1)), (before, (batch,)), (ring_k, (*ring, key_dim)), (ring_v, (*ring, value_dim)),
        (slot_k, (*slots, key_dim)), (slot_v, (*slots, value_dim)), (slot_n, slots),
    )  # fmt: skip
    expect("slots_chunk", inputs)
    outputs = (
        torch.empty((batch, 1, heads, value_dim)),
        *[torch.empty_like(x, memory_format=torch.contiguous_format) for x in (ring_k, ring_v, slot_k, slot_v, slot_n)],
    )
    items = count + window
    sizes = round_sizes(items, count, sinks, rounds)
    tensors = (*[plain(x) for x, _ in inputs], *outputs, torch.empty(items * (key_dim + value_dim + 1)))
    counts = (batch, heads, kv_heads, key_dim, value_dim, window, count, sinks, len(sizes), *sizes)
    if run(library("slots").slots_step, tensors, counts, (scale, decay)):  # type: ignore[union-attr]
        raise MemoryError("linearize::slots_chunk: no memory to merge slots in")
    return outputs  # type: ignore[return-value]


def declines(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, before: Tensor, ring_k: Tensor, ring_v: Tensor, slot_k: Tensor,
    slot_v: Tensor, slot_n: Tensor, *, window: int, **kwargs: object,
) -> str | None:  # fmt: skip
    if q.shape[1] != 1:
        return f"T is {q.shape[1]}, not 1"
    for x in (q, ring_k, ring_v, slot_k):
        if x.dtype is not torch.float32:
            return f"{x.dtype}, not float32"
    if mask.dtype is not torch.bool or before.dtype is not torch.int64:
        return "mask must be bool and before int64"
    count = slot_n.shape[2]
    for p in before.tolist():
        held = max(0, p // window - 1) * window
        if p < 0 or (held < count < held + window and (p + 1) % window == 0):
            return "a block joins slots that it only just fills"
    return None


SLOTS_STEP_C = register(Kernel("cpu.slots_step_c", "slots_chunk", "cpu", 30, declines, step, partial(missing, "slots")))
