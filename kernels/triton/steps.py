"""`gla_step`, `gla_vec_step` and the one-token cases of their chunked forms on a GPU: one launch a layer, the states
read and written once.

Letters and shapes as in `linearize.ops.steps`. A program holds [K,BV] of one state and serves the query heads that
share it. Which state a row has is read on the device, so that the launch can stand in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.triton import _launch
from linearize.kernels.triton._config import Config, accumulator, architecture, block
from linearize.kernels.triton.gla import LOG2_E
from linearize.ops._library import accumulation_dtype
from linearize.ops.gla import check_gla, state_head_count
from linearize.ops.gla_vec import check_gla_vec
from linearize.ops.steps import check_gla_step, check_gla_vec_step


@triton.jit
def gla_step_kernel(
    q, k, v, g, before, after, index, o,
    scale, H, HS, N, SHARED,
    q_b, q_h, k_b, k_h, v_b, v_h, g_b, g_h,
    K: tl.constexpr, V: tl.constexpr, HAS_G: tl.constexpr, BY_CHANNEL: tl.constexpr, HAS_S: tl.constexpr,
    HAS_INDEX: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One block [K,BV] of one state; `before` and `after` may be the same memory."""
    b, head = tl.program_id(1) // HS, tl.program_id(1) % HS
    rows, columns = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    inside, kept = rows < K, (rows < K)[:, None] & (columns < V)[None, :]
    batch = b.to(tl.int64)
    owner = batch
    if HAS_INDEX:
        owner = tl.load(index + b).to(tl.int64)
    place = (owner * HS + head) * K * V + rows[:, None] * V + columns[None, :]
    k_K = tl.load(k + batch * k_b + (head // N) * k_h + rows, mask=inside, other=0.0).to(ACC)
    v_V = tl.load(v + batch * v_b + (head // N) * v_h + columns, mask=columns < V, other=0.0).to(ACC)
    state = k_K[:, None] * v_V[None, :]
    if HAS_S:
        held = tl.load(before + place, mask=kept, other=0.0).to(ACC)
        if BY_CHANNEL:
            gates = tl.load(g + batch * g_b + head * g_h + rows, mask=inside, other=0.0).to(ACC)
            held *= tl.exp2(gates * LOG2_E)[:, None]
        elif HAS_G:
            held *= tl.exp2(tl.load(g + batch * g_b + head * g_h).to(ACC) * LOG2_E)
        state += held
    tl.store(after + place, state, mask=kept)
    for r in range(0, SHARED):
        reader = head * SHARED + r
        q_K = tl.load(q + batch * q_b + reader * q_h + rows, mask=inside, other=0.0).to(ACC)
        out = tl.sum(q_K[:, None] * state, 0) * scale
        tl.store(o + (batch * H + reader) * V + columns, out.to(o.dtype.element_ty), mask=columns < V)


def gla_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, index: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """See `linearize.ops.steps`; s is updated in place."""
    check_gla_step(q, k, v, g, s, index)
    return in_place(lambda pool: _step(q, k, v, g, pool, pool, index, scale), s)


def gla_vec_step(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, index: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """See `linearize.ops.steps`; s is updated in place."""
    check_gla_vec_step(q, k, v, g, s, index)
    return in_place(lambda pool: _step(q, k, v, g, pool, pool, index, scale), s)


def in_place(step: Callable[[Tensor], Tensor], s: Tensor) -> Tensor:
    """`step` of the pool s, which it updates; kernels take it contiguous."""
    if s.is_contiguous():
        return step(s)
    copy = s.contiguous()
    o = step(copy)
    s.copy_(copy)
    return o


def gla_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """`gla_chunk` for T = 1: the new state is a new tensor."""
    check_gla(q, k, v, g, s0)
    shape = (q.shape[0], state_head_count(k, g), k.shape[3], v.shape[3])
    s = q.new_empty(shape, dtype=accumulation_dtype(q.dtype))
    return _step(q, k, v, g, None if s0 is None else s0.contiguous(), s, None, scale), s


def gla_vec_one(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s0: Tensor | None = None, *, scale: float = 1.0, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """`gla_vec_chunk` for T = 1: the new state is a new tensor."""
    check_gla_vec(q, k, v, g, s0)
    s = q.new_empty(q.shape[0], g.shape[2], k.shape[3], v.shape[3], dtype=accumulation_dtype(q.dtype))
    return _step(q, k, v, g, None if s0 is None else s0.contiguous(), s, None, scale), s


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    before: Tensor | None,
    after: Tensor,
    index: Tensor | None,
    scale: float,
) -> Tensor:
    q, k, v = (_launch.inner_contiguous(x) for x in (q, k, v))
    by_channel = g is not None and g.ndim == 4
    g = _launch.inner_contiguous(g) if g is not None and by_channel else g
    (batch, _, heads, key_dim), value_dim, states = q.shape, v.shape[3], after.shape[1]
    o = q.new_empty(batch, 1, heads, value_dim)
    args = (
        q, k, v, q if g is None else g, after if before is None else before, after, q if index is None else index, o,
        scale, heads, states, states // k.shape[2], heads // states,
        *row_strides(q), *row_strides(k), *row_strides(v), *row_strides(g),
    )  # fmt: skip
    constants: dict[str, Any] = {
        "K": key_dim, "V": value_dim, "HAS_G": g is not None, "BY_CHANNEL": by_channel,
        "HAS_S": before is not None, "HAS_INDEX": index is not None, "ACC": accumulator(q), "BK": block(key_dim, 1024),
    }  # fmt: skip

    def grid(config: Config) -> tuple[int, ...]:
        return triton.cdiv(value_dim, config.blocks["BV"]), batch * states

    _launch.launch(gla_step_kernel, grid, args, constants, step_configs(architecture(q), key_dim, batch * states))
    return o


def row_strides(x: Tensor | None) -> tuple[int, int]:
    return (0, 0) if x is None else (x.stride(0), x.stride(2))


def step_configs(arch: int, key_dim: int, states: int) -> tuple[Config, ...]:
    """A block of about 4,096 numbers a program: 32 in flight a thread, and enough programs at a small batch."""
    return (Config(4, 1, {"BV": max(16, min(64, 4096 // block(key_dim, 1024)))}),)
