"""`gla_chunk` on a GPU: a state pass over the chunks of a head, then every chunk's outputs at once.

    state pass    S_c = state before chunk c;  S_{c+1} = e^{total_c} S_c + (e^{rest} k_c)^T v_c
    output pass   o_c = scale ( e^{elapsed} q_c S_c + (q_c k_c^T * D_c) v_c ),   D_ij = e^{g_{j+1} + .. + g_i}, j <= i

The two passes of flash-linear-attention (Yang and Zhang 2024), written anew. Letters and shapes as in
`linearize.ops.gla`; C = 64 tokens a chunk. Gates are scaled by log2 e once so that exp2 serves.

D is the exponential of a difference of running sums, which would lose its digits behind a gate of -80. So sums are held
in two parts: multiples of 1/64, whose sums and differences float32 holds exactly, and remainders below 1/64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.triton import _launch
from linearize.kernels.triton._config import (
    CHUNK,
    Config,
    accumulator,
    architecture,
    block,
    precision,
    state_dtype,
)
from linearize.ops._library import accumulation_dtype
from linearize.ops.gla import check_gla, state_head_count

LOG2_E = tl.constexpr(1.4426950408889634)
COARSE, LEAST = tl.constexpr(64.0), tl.constexpr(-1000.0)


@triton.jit
def gate_sums(g, ACC: tl.constexpr):
    """g [C], log2 of the gates -> its running sums as (multiples of 1/64, remainders); steps below 2^-1000 are 2^-1000.

    64 steps of 1000 are 64 * 64 * 1000 multiples of 1/64, below the 2^24 that float32 counts exactly.
    """
    g = tl.maximum(g.to(ACC), LEAST)
    coarse = tl.floor(g * COARSE) / COARSE
    return tl.cumsum(coarse, 0), tl.cumsum(g - coarse, 0)


@triton.jit
def last_of(x, ROWS: tl.constexpr):
    """The last number of x [C], without rounding."""
    return tl.sum(tl.where(tl.arange(0, ROWS) == ROWS - 1, x, 0.0), 0)


@triton.jit(do_not_specialize=["T"])
def gla_state_kernel(
    k, v, g, s0, h, s,
    T, HS, N,
    k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr, HAS_S0: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One block [BK,BV] of one state over all chunks; h [B,NT,Hs,K,V] takes the state before each, s the last."""
    b, head = tl.program_id(2) // HS, tl.program_id(2) % HS
    rows = tl.program_id(0) * BK + tl.arange(0, BK)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    kept = (rows < K)[:, None] & (columns < V)[None, :]
    place = rows[:, None] * V + columns[None, :]
    batch = b.to(tl.int64)
    k += batch * k_b + (head // N) * k_h
    v += batch * v_b + (head // N) * v_h
    chunks = tl.cdiv(T, C)
    state = tl.zeros([BK, BV], dtype=ACC)
    if HAS_S0:
        state += tl.load(s0 + (batch * HS + head) * K * V + place, mask=kept, other=0.0).to(ACC)
    for c in range(0, chunks):
        t = c * C + tl.arange(0, C)
        tl.store(h + ((batch * chunks + c) * HS + head) * K * V + place, state.to(h.dtype.element_ty), mask=kept)
        at = t.to(tl.int64)
        k_KC = tl.load(k + rows[:, None] + at[None, :] * k_t, mask=(rows < K)[:, None] & (t < T)[None, :], other=0.0)
        seen = (t < T)[:, None] & (columns < V)[None, :]
        v_CV = tl.load(v + at[:, None] * v_t + columns[None, :], mask=seen, other=0.0)
        if HAS_G:
            gates = tl.load(g + batch * g_b + at * g_t + head * g_h, mask=t < T, other=0.0).to(ACC) * LOG2_E
            coarse, fine = gate_sums(gates, ACC)
            total, rest = last_of(coarse, C), last_of(fine, C)
            state *= tl.exp2(total + rest)
            k_KC = (k_KC.to(ACC) * tl.exp2((total - coarse) + (rest - fine))[None, :]).to(k_KC.dtype)
        state = tl.dot(k_KC, v_CV, acc=state, input_precision=PRECISION, out_dtype=ACC)
    tl.store(s + (batch * HS + head) * K * V + place, state, mask=kept)


@triton.jit(do_not_specialize=["T"])
def gla_output_kernel(
    q, k, v, g, h, o,
    scale, T, H, HS, R, RV, N,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, h_k, h_v,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr, STRICT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o [B,T,H,V] of one chunk, query head and block of value columns; STRICT: without the token itself."""
    c, b, head = tl.program_id(1), tl.program_id(2) // H, tl.program_id(2) % H
    kv_head = head // R
    state_head = head // (R // N)
    columns = tl.program_id(0) * BV + tl.arange(0, BV)
    batch, t = b.to(tl.int64), c * C + tl.arange(0, C)
    at, real = t.to(tl.int64), t < T
    q += batch * q_b + head * q_h
    k += batch * k_b + kv_head * k_h
    h += ((batch * tl.cdiv(T, C) + c) * HS + state_head) * K * V
    out = tl.zeros([C, BV], dtype=ACC)
    scores = tl.zeros([C, C], dtype=ACC)
    for i in range(0, tl.cdiv(K, BK)):
        rows = i * BK + tl.arange(0, BK)
        q_CK = tl.load(q + at[:, None] * q_t + rows[None, :], mask=real[:, None] & (rows < K)[None, :], other=0.0)
        k_KC = tl.load(k + rows[:, None] + at[None, :] * k_t, mask=(rows < K)[:, None] & real[None, :], other=0.0)
        h_KV = tl.load(
            h + rows[:, None] * h_k + columns[None, :] * h_v,
            mask=(rows < K)[:, None] & (columns < V)[None, :], other=0.0,
        )  # fmt: skip
        out = tl.dot(q_CK.to(h_KV.dtype), h_KV, acc=out, input_precision=PRECISION, out_dtype=ACC)
        scores = tl.dot(q_CK, k_KC, acc=scores, input_precision=PRECISION, out_dtype=ACC)
    i = tl.arange(0, C)
    earlier = (i[:, None] > i[None, :]) if STRICT else (i[:, None] >= i[None, :])
    if HAS_G:
        gates = tl.load(g + batch * g_b + at * g_t + state_head * g_h, mask=real, other=0.0).to(ACC) * LOG2_E
        coarse, fine = gate_sums(gates, ACC)
        out *= tl.exp2(coarse + fine)[:, None]
        spans = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        scores *= tl.exp2(tl.where(earlier, spans, 0.0))
    scores = tl.where(earlier, scores, 0.0)
    v_CV = tl.load(
        v + batch * v_b + (head // RV) * v_h + at[:, None] * v_t + columns[None, :],
        mask=real[:, None] & (columns < V)[None, :], other=0.0,
    )  # fmt: skip
    out = tl.dot(scores.to(v_CV.dtype), v_CV, acc=out, input_precision=PRECISION, out_dtype=ACC) * scale
    o += ((batch * T + at[:, None]) * H + head) * V + columns[None, :]
    tl.store(o, out.to(o.dtype.element_ty), mask=real[:, None] & (columns < V)[None, :])


def gla_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """See `linearize.ops.gla`. The chunk is the kernel's own; `chunk` is for the streamed forms."""
    check_gla(q, k, v, g, s0)
    k, v = _launch.inner_contiguous(k), _launch.inner_contiguous(v)
    h, s = states(k, v, g, s0, q)
    return outputs(q, k, v, g, h, scale), s


def states(k: Tensor, v: Tensor, g: Tensor | None, s0: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """(the state before each chunk [B,NT,Hs,K,V], the last [B,Hs,K,V])."""
    (batch, length, kv_heads, key_dim), value_dim, heads = k.shape, v.shape[3], state_head_count(k, g)
    h = k.new_empty(batch, triton.cdiv(length, CHUNK), heads, key_dim, value_dim, dtype=state_dtype(like))
    s = k.new_empty(batch, heads, key_dim, value_dim, dtype=accumulation_dtype(like.dtype))
    args = (
        k, v, k if g is None else g, s if s0 is None else s0.contiguous(), h, s,
        length, heads, heads // kv_heads, *k.stride()[:3], *v.stride()[:3], *gate_strides(g),
    )  # fmt: skip
    constants = shared_constants(like, key_dim, value_dim, g) | {"HAS_S0": s0 is not None}

    def grid(config: Config) -> tuple[int, ...]:
        return triton.cdiv(key_dim, config.blocks["BK"]), triton.cdiv(value_dim, config.blocks["BV"]), batch * heads

    _launch.launch(gla_state_kernel, grid, args, constants, state_configs(architecture(k), like, key_dim, value_dim))
    return h, s


def outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    h: Tensor,
    scale: float,
    dtype: torch.dtype | None = None,
    chunk: int = CHUNK,
    strict: bool = False,
) -> Tensor:
    """o [B,T,H,V] from the states before each chunk, which may be a view of others with the last dims swapped."""
    q = _launch.inner_contiguous(q)
    (batch, length, heads, key_dim), kv_heads, value_dim, states = q.shape, k.shape[2], v.shape[3], h.shape[2]
    o = q.new_empty(batch, length, heads, value_dim, dtype=dtype or q.dtype)
    args = (
        q, k, v, k if g is None else g, h, o,
        scale, length, heads, states, heads // kv_heads, heads // v.shape[2], states // kv_heads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *gate_strides(g), *h.stride()[3:],
    )  # fmt: skip

    def grid(config: Config) -> tuple[int, ...]:
        return triton.cdiv(value_dim, config.blocks["BV"]), h.shape[1], batch * heads

    constants = shared_constants(q, key_dim, value_dim, g) | {"C": chunk, "STRICT": strict}
    _launch.launch(gla_output_kernel, grid, args, constants, output_configs(architecture(q), q, key_dim, value_dim))
    return o


def shared_constants(q: Tensor, key_dim: int, value_dim: int, g: Tensor | None) -> dict[str, Any]:
    return {
        "K": key_dim, "V": value_dim, "C": CHUNK, "HAS_G": g is not None,
        "ACC": accumulator(q), "PRECISION": precision(q),
    }  # fmt: skip


def gate_strides(g: Tensor | None) -> tuple[int, ...]:
    return (0, 0, 0) if g is None else g.stride()[:3]


def state_configs(arch: int, x: Tensor, key_dim: int, value_dim: int) -> tuple[Config, ...]:
    """Small blocks, since a state's blocks are all the parallelism that a short batch has."""
    if x.element_size() > 2:
        return (Config(4, 2, {"BK": block(key_dim, 32), "BV": block(value_dim, 32)}),)
    stages = 3 if arch >= 90 else 2
    square = Config(4, stages, {"BK": block(key_dim, 64), "BV": block(value_dim, 64)})
    return square, Config(2, 3, {"BK": block(key_dim, 64), "BV": block(value_dim, 32)})


def output_configs(arch: int, x: Tensor, key_dim: int, value_dim: int) -> tuple[Config, ...]:
    """Whole rows of values where they fit: a score tile made twice is a product wasted."""
    if x.element_size() > 2:
        return (Config(8, 2, {"BK": 16, "BV": block(value_dim, 32)}),)
    keys = block(key_dim, 64)
    whole = Config(4 if value_dim <= 64 else 8, 2, {"BK": keys, "BV": block(value_dim, 128)})
    return whole, Config(4, 3, {"BK": keys, "BV": block(value_dim, 64)})
