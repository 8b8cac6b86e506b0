"""`gla_step`, `gla_vec_step`, `delta_step` and `hybrid_step` on CPU: `steps.c` and `hybrid.c`, one pass over a state.

Without a compiler, and for float64, the operators' own torch form runs (`linearize.ops.steps`, `.hybrid_step`).
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from torch import Tensor

from linearize.kernels.cpu.native import expect, library, missing, plain, run
from linearize.kernels.registry import Kernel, register
from linearize.ops._library import require
from linearize.ops.delta import NORM_EPSILON
from linearize.ops.hybrid_step import check_hybrid_step
from linearize.ops.steps import check_delta_step, check_gla_step, check_gla_vec_step


def gla_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, index: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """See `linearize.ops.steps`."""
    check_gla_step(q, k, v, g, s, index)
    return _gla(q, k, v, g, s, index, scale)


def gla_vec_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, index: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """See `linearize.ops.steps`."""
    check_gla_vec_step(q, k, v, g, s, index)
    return _gla(q, k, v, g, s, index, scale)


def _gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, index: Tensor | None, scale: float) -> Tensor:
    o = torch.empty(*q.shape[:3], v.shape[3])
    gates = (q.shape[0], 1, s.shape[1]) if g is None or g.ndim == 3 else (q.shape[0], 1, *s.shape[1:3])
    expect("gla_step", (*shapes(q, k, v, s), (g, gates)))
    tensors = (plain(q), plain(k), plain(v), plain(g), s, within(index, s.shape[0]), o)
    sizes = (q.shape[0], q.shape[2], k.shape[2], *s.shape[1:], 0 if g is None else g.ndim - 3)
    run(library("steps").gla_step, tensors, sizes, (scale,))  # type: ignore[union-attr]
    return o.to(q.dtype)


def delta_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s: Tensor,
    index: Tensor | None = None,
    *,
    scale: float = 1.0,
    l2norm: bool = False,
) -> Tensor:
    """See `linearize.ops.steps`."""
    check_delta_step(q, k, v, beta, g, s, index)
    o = torch.empty(*q.shape[:3], v.shape[3])
    expect("delta_step", (*shapes(q, k, v, s), (beta, (q.shape[0], 1, s.shape[1])), (g, (q.shape[0], 1, s.shape[1]))))
    tensors = (plain(q), plain(k), plain(v), plain(beta), plain(g), s, within(index, s.shape[0]), o)
    sizes = (q.shape[0], q.shape[2], k.shape[2], *s.shape[1:], int(l2norm))
    run(library("steps").delta_step, tensors, sizes, (scale, NORM_EPSILON))  # type: ignore[union-attr]
    return o.to(q.dtype)


def hybrid_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor | None,
    fk: Tensor | None,
    pos: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_f: Tensor | None = None,
    s: Tensor | None = None,
    z: Tensor | None = None,
    mix: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_logits: Tensor | None = None,
    index: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> Tensor:
    """See `linearize.ops.hybrid_step`."""
    check_hybrid_step(q, k, v, fq, fk, pos, ring_k, ring_v, ring_f, s, z, sink_k, sink_v, index, window)
    o = torch.empty(*q.shape[:3], v.shape[3])
    (batch, _, heads, dim), (kv_heads, width), rows = q.shape, v.shape[2:], ring_k.shape[0]
    sinks, features = 0 if sink_k is None else sink_k.shape[1], 0 if fk is None else fk.shape[3]
    logits, line, kept = 0 if sink_logits is None else sink_logits.shape[1], (rows, 2 * window), (rows, kv_heads)
    expect(
        "hybrid_step",
        (
            (q, (batch, 1, heads, dim)), (k, (batch, 1, kv_heads, dim)), (v, (batch, 1, kv_heads, width)),
            (fq, (batch, 1, heads, features)), (fk, (batch, 1, kv_heads, features)), (pos, (batch,)),
            (ring_k, (*line, kv_heads, dim)), (ring_v, (*line, kv_heads, width)), (ring_f, (*line, kv_heads, features)),
            (s, (*kept, features, width)), (z, (*kept, features)), (mix, (heads,)),
            (sink_k, (rows, sinks, kv_heads, dim)), (sink_v, (rows, sinks, kv_heads, width)),
            (sink_logits, (heads, logits)),
        ),
    )  # fmt: skip
    new = [plain(x) for x in (q, k, v, fq, fk)]
    pools = (
        ring_k,
        ring_v,
        ring_f,
        s,
        z,
        plain(mix),
        sink_k,
        sink_v,
        plain(sink_logits),
        within(index, ring_k.shape[0]),
        o,
    )
    sizes = (batch, heads, kv_heads, dim, width, features, window, sinks, logits)
    run(library("hybrid").hybrid_step, (*new, within(pos, sys.maxsize), *pools), sizes, (scale,))  # type: ignore[union-attr]
    return o.to(q.dtype)


def shapes(q: Tensor, k: Tensor, v: Tensor, s: Tensor) -> tuple[tuple[Tensor, tuple[int, ...]], ...]:
    """What q, k, v and the pool must be: the operator's own check compares heads and lengths alone."""
    batch, _, kv_heads, key_dim = k.shape
    return (
        (q, (batch, 1, q.shape[2], key_dim)),
        (v, (batch, 1, kv_heads, v.shape[3])),
        (s, (s.shape[0], s.shape[1], key_dim, v.shape[3])),
    )


def within(index: Tensor | None, rows: int) -> Tensor | None:
    """The index as C reads it, which does not look whether it stays inside the pool."""
    if index is None:
        return None
    low, high = torch.aminmax(index)
    require(0 <= int(low) and int(high) < rows, "step", f"rows {int(low)} to {int(high)} are outside a pool of {rows}")
    return index.contiguous()


def pools_in_place(*pools: Tensor | None) -> str | None:
    """Why C cannot write to these, or None."""
    for pool in pools:
        if pool is not None and pool.dtype != torch.float32:
            return f"states are {pool.dtype}, not float32"
        if pool is not None and not pool.is_contiguous():
            return "a state is not contiguous"
    return None


def _check_gla(q: Tensor, k: Tensor, v: Tensor, g: object, s: Tensor, *args: object, **kwargs: object) -> str | None:
    return pools_in_place(s)


def _check_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: object, s: Tensor, *args: object, **kwargs: object
) -> str | None:
    return pools_in_place(s)


def _check_hybrid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: object,
    fk: object,
    pos: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_f: Tensor | None = None,
    s: Tensor | None = None,
    z: Tensor | None = None,
    mix: object = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    *args: object,
    **kwargs: object,
) -> str | None:
    return pools_in_place(ring_k, ring_v, ring_f, s, z, sink_k, sink_v)


STEPS, HYBRID = partial(missing, "steps"), partial(missing, "hybrid")
GLA_STEP_C = register(Kernel("cpu.gla_step_c", "gla_step", "cpu", 20, _check_gla, gla_step, STEPS))
GLA_VEC_STEP_C = register(Kernel("cpu.gla_vec_step_c", "gla_vec_step", "cpu", 20, _check_gla, gla_vec_step, STEPS))
DELTA_STEP_C = register(Kernel("cpu.delta_step_c", "delta_step", "cpu", 20, _check_delta, delta_step, STEPS))
HYBRID_STEP_C = register(Kernel("cpu.hybrid_step_c", "hybrid_step", "cpu", 20, _check_hybrid, hybrid_step, HYBRID))
