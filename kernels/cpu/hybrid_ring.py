"""`hybrid_ring` on CPU for one token: `hybrid.c`, one call for ring, sinks, features, softmax and state.

Longer calls, float64, and machines without a compiler run it over `hybrid_chunk` and its kernels.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from linearize.kernels.cpu.native import expect, library, missing, plain, run
from linearize.kernels.registry import Kernel, register
from linearize.ops.hybrid_ring import Outputs, check_ring


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    positions: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_mask: Tensor,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    query_map: Tensor | None = None,
    key_map: Tensor | None = None,
    omega: Tensor | None = None,
    sink_logits: Tensor | None = None,
    s0: Tensor | None = None,
    z0: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> Outputs:
    """See `linearize.ops.hybrid_ring`."""
    (batch, _, heads, head_dim), (kv_heads, value_dim) = q.shape, v.shape[2:]
    sinks, half = 0 if sink_k is None else sink_k.shape[1], 0 if key_map is None else key_map.shape[2]
    logits, width = 0 if sink_logits is None else sink_logits.shape[1], 2 * half
    ring, token = (batch, window, kv_heads), (batch, 1, kv_heads)
    if heads % kv_heads or (sink_k is None) != (sink_v is None) or (query_map is None) != (key_map is None):
        check_ring(
            q, k, v, mask, positions, (ring_k, ring_v, ring_mask), (sink_k, sink_v), (query_map, key_map), window
        )
    if half and s0 is None:
        s0 = torch.zeros(batch, kv_heads, width, value_dim)
    if half and z0 is None:
        z0 = torch.zeros(batch, kv_heads, width)
    inputs = (
        (q, (batch, 1, heads, head_dim)), (k, (*token, head_dim)), (v, (*token, value_dim)),
        (mask, (batch, 1)), (positions, (batch, 1)),
        (ring_k, (*ring, head_dim)), (ring_v, (*ring, value_dim)), (ring_mask, (batch, window)),
        (sink_k, (batch, sinks, kv_heads, head_dim)), (sink_v, (batch, sinks, kv_heads, value_dim)),
        (query_map, (heads, head_dim, half)), (key_map, (kv_heads, head_dim, half)),
        (omega, (heads,)), (sink_logits, (heads, logits)),
        (s0, (batch, kv_heads, width, value_dim)), (z0, (batch, kv_heads, width)),
    )  # fmt: skip
    expect("hybrid_ring", inputs)
    outputs = (
        torch.empty((batch, 1, heads, value_dim)),
        torch.empty_like(ring_k),
        torch.empty_like(ring_v),
        torch.empty_like(ring_mask),
        torch.empty((batch, sinks, kv_heads, head_dim)),
        torch.empty((batch, sinks, kv_heads, value_dim)),
        torch.empty((batch, kv_heads, width, value_dim)),
        torch.empty((batch, kv_heads, width)),
    )
    sizes = (batch, heads, kv_heads, head_dim, value_dim, half, window, sinks, logits)
    run(library("hybrid").hybrid_ring, (*[plain(x) for x, _ in inputs], *outputs), sizes, (scale,))  # type: ignore[union-attr]
    return outputs


def declines(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, positions: Tensor, ring_k: Tensor, ring_v: Tensor,
    ring_mask: Tensor, *args: object, **kwargs: object,
) -> str | None:  # fmt: skip
    if q.shape[1] != 1:
        return f"T is {q.shape[1]}, not 1"
    for x in (q, ring_k, ring_v):
        if x.dtype is not torch.float32:
            return f"{x.dtype}, not float32"
        if not x.is_contiguous() and x is not q:
            return "a ring is not contiguous"
    if mask.dtype is not torch.bool or ring_mask.dtype is not torch.bool or positions.dtype is not torch.int64:
        return "masks must be bool and positions int64"
    return None


HYBRID_RING_C = register(
    Kernel("cpu.hybrid_ring_c", "hybrid_ring", "cpu", 20, declines, step, partial(missing, "hybrid"))
)
