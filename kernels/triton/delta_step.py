"""`delta_step` and the one-token case of `delta_chunk` on a GPU: one launch a layer, the states read and written once.

Letters and shapes as in `linearize.ops.steps`. A program holds [K,BV] of one state, whole columns, since the correction
of a value is what the state says of the whole key. Which state a row has is read on the device, so that the launch can
stand in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.triton import _launch
from linearize.kernels.triton._config import Config, accumulator, architecture, block
from linearize.kernels.triton.gla import LOG2_E
from linearize.kernels.triton.steps import in_place, row_strides
from linearize.ops._library import accumulation_dtype
from linearize.ops.delta import NORM_EPSILON, check_delta
from linearize.ops.steps import check_delta_step

EPSILON = tl.constexpr(NORM_EPSILON)


@triton.jit
def delta_step_kernel(
    q, k, v, beta, g, before, after, index, o,
    scale, H, HS, N, SHARED,
    q_b, q_h, k_b, k_h, v_b, v_h, b_b, b_h, g_b, g_h,
    K: tl.constexpr, V: tl.constexpr, HAS_G: tl.constexpr, HAS_S: tl.constexpr, HAS_INDEX: tl.constexpr,
    NORM: tl.constexpr, ACC: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
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
    if NORM:
        k_K *= tl.rsqrt(tl.sum(k_K * k_K, 0) + EPSILON)
    u_V = tl.load(v + batch * v_b + (head // N) * v_h + columns, mask=columns < V, other=0.0).to(ACC)
    weight = tl.load(beta + batch * b_b + head * b_h).to(ACC)
    state = tl.zeros([BK, BV], dtype=ACC)
    if HAS_S:
        state = tl.load(before + place, mask=kept, other=0.0).to(ACC)
        if HAS_G:
            state *= tl.exp2(tl.load(g + batch * g_b + head * g_h).to(ACC) * LOG2_E)
        u_V -= tl.sum(k_K[:, None] * state, 0)
    state += k_K[:, None] * (weight * u_V)[None, :]
    tl.store(after + place, state, mask=kept)
    for r in range(0, SHARED):
        reader = head * SHARED + r
        q_K = tl.load(q + batch * q_b + reader * q_h + rows, mask=inside, other=0.0).to(ACC)
        if NORM:
            q_K *= tl.rsqrt(tl.sum(q_K * q_K, 0) + EPSILON)
        out = tl.sum(q_K[:, None] * state, 0) * scale
        tl.store(o + (batch * H + reader) * V + columns, out.to(o.dtype.element_ty), mask=columns < V)


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
    """See `linearize.ops.steps`; s is updated in place."""
    check_delta_step(q, k, v, beta, g, s, index)
    return in_place(lambda pool: _step(q, k, v, beta, g, pool, pool, index, scale, l2norm), s)


def delta_one(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 32,
    l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """`delta_chunk` for T = 1: the new state is a new tensor."""
    check_delta(q, k, v, beta, g, s0)
    s = q.new_empty(q.shape[0], beta.shape[2], k.shape[3], v.shape[3], dtype=accumulation_dtype(q.dtype))
    before = None if s0 is None else s0.contiguous()
    return _step(q, k, v, beta, g, before, s, None, scale, l2norm), s


def _step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    before: Tensor | None,
    after: Tensor,
    index: Tensor | None,
    scale: float,
    l2norm: bool,
) -> Tensor:
    q, k, v = (_launch.inner_contiguous(x) for x in (q, k, v))
    (batch, _, heads, key_dim), value_dim, states = q.shape, v.shape[3], after.shape[1]
    o = q.new_empty(batch, 1, heads, value_dim)
    args = (
        q, k, v, beta, q if g is None else g, after if before is None else before, after,
        q if index is None else index, o, scale, heads, states, states // k.shape[2], heads // states,
        *row_strides(q), *row_strides(k), *row_strides(v), *row_strides(beta), *row_strides(g),
    )  # fmt: skip
    constants: dict[str, Any] = {
        "K": key_dim, "V": value_dim, "HAS_G": g is not None, "HAS_S": before is not None,
        "HAS_INDEX": index is not None, "NORM": l2norm, "ACC": accumulator(q), "BK": block(key_dim, 1024),
    }  # fmt: skip

    def grid(config: Config) -> tuple[int, ...]:
        return triton.cdiv(value_dim, config.blocks["BV"]), batch * states

    _launch.launch(delta_step_kernel, grid, args, constants, step_configs(architecture(q), key_dim))
    return o


def step_configs(arch: int, key_dim: int) -> tuple[Config, ...]:
    """As in `steps.py`, over twice the warps: state, key and correction together spill 64 registers."""
    return (Config(8, 1, {"BV": max(16, min(64, 4096 // block(key_dim, 1024)))}),)
