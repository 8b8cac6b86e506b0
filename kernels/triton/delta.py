"""`delta_chunk` on a GPU: the corrections of every chunk in WY form, a state pass, then all outputs at once.

    prepare    X = (I + L)^-1,  L_ij = b_i D_ij k_i.k_j below the diagonal;   w = X (b e^{elapsed} k),   y = X (b v)
    state      u_c = y_c - w_c S_c;   S_{c+1} = e^{total_c} S_c + (e^{rest} k_c)^T u_c
    output     the output pass of `gla.py` with u for v

Letters and shapes as in `linearize.ops.delta`; C = 32 tokens a chunk. X is made from the inverses of diagonal blocks,
twice as large at each level: with E the part of L that the larger blocks add, E X E = 0, so the inverse is X - X E X.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.triton import _launch
from linearize.kernels.triton._config import (
    Config,
    architecture,
    block,
    state_dtype,
)
from linearize.kernels.triton.gla import LOG2_E, gate_strides, gate_sums, last_of, outputs, shared_constants
from linearize.ops._library import accumulation_dtype
from linearize.ops.delta import check_delta, normalised

TOKENS = 32  # a chunk: the inverse of 64 x 64 spills registers


@triton.jit
def unit_inverse(lower, ROWS: tl.constexpr, LEVELS: tl.constexpr, ACC: tl.constexpr, EXACT: tl.constexpr):
    """(I + lower)^-1 of a strictly lower triangular [C,C]."""
    i = tl.arange(0, ROWS)
    apart = i[:, None] ^ i[None, :]  # below 2^n: in the same block of 2^n
    inverse = tl.where(apart == 0, tl.full([ROWS, ROWS], 1.0, dtype=ACC), 0.0) - tl.where(apart == 1, lower, 0.0)
    for level in range(1, LEVELS):
        added = tl.where((apart >> level) == 1, lower, 0.0)
        half = tl.dot(inverse, added, input_precision=EXACT, out_dtype=ACC)
        inverse -= tl.dot(half, inverse, input_precision=EXACT, out_dtype=ACC)
    return inverse


@triton.jit(do_not_specialize=["T"])
def delta_prepare_kernel(
    k, v, beta, g, w, y,
    T, HS, N,
    k_b, k_t, k_h, v_b, v_t, v_h, b_b, b_t, b_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, HAS_G: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """w [B,T,Hs,K] and y [B,T,Hs,V] of one chunk and state."""
    c, b, head = tl.program_id(0), tl.program_id(1) // HS, tl.program_id(1) % HS
    i, batch = tl.arange(0, C), b.to(tl.int64)
    t = c * C + i
    at, real = t.to(tl.int64), t < T
    k += batch * k_b + (head // N) * k_h
    v += batch * v_b + (head // N) * v_h
    weight = tl.load(beta + batch * b_b + at * b_t + head * b_h, mask=real, other=0.0).to(ACC)
    lower = tl.zeros([C, C], dtype=ACC)
    for first in range(0, K, BK):
        rows = first + tl.arange(0, BK)
        k_CK = tl.load(k + at[:, None] * k_t + rows[None, :], mask=real[:, None] & (rows < K)[None, :], other=0.0)
        k_KC = tl.load(k + rows[:, None] + at[None, :] * k_t, mask=(rows < K)[:, None] & real[None, :], other=0.0)
        lower = tl.dot(k_CK, k_KC, acc=lower, input_precision=PRECISION, out_dtype=ACC)
    elapsed, before = tl.full([C], 1.0, dtype=ACC), i[:, None] > i[None, :]
    if HAS_G:
        gates = tl.load(g + batch * g_b + at * g_t + head * g_h, mask=real, other=0.0).to(ACC) * LOG2_E
        coarse, fine = gate_sums(gates, ACC)
        spans = (coarse[:, None] - coarse[None, :]) + (fine[:, None] - fine[None, :])
        lower *= tl.exp2(tl.where(before, spans, 0.0))
        elapsed = tl.exp2(coarse + fine)
    inverse = unit_inverse(tl.where(before, lower * weight[:, None], 0.0), C, LEVELS, ACC, EXACT)
    out = (batch * T + at[:, None]) * HS + head
    for first in range(0, K, BK):
        rows = first + tl.arange(0, BK)
        seen = real[:, None] & (rows < K)[None, :]
        k_CK = tl.load(k + at[:, None] * k_t + rows[None, :], mask=seen, other=0.0)
        weighed = (k_CK.to(ACC) * (weight * elapsed)[:, None]).to(k_CK.dtype)
        part = tl.dot(inverse.to(k_CK.dtype), weighed, input_precision=PRECISION, out_dtype=ACC)
        tl.store(w + out * K + rows[None, :], part.to(w.dtype.element_ty), mask=seen)
    for first in range(0, V, BV):
        columns = first + tl.arange(0, BV)
        seen = real[:, None] & (columns < V)[None, :]
        v_CV = tl.load(v + at[:, None] * v_t + columns[None, :], mask=seen, other=0.0)
        weighed = (v_CV.to(ACC) * weight[:, None]).to(v_CV.dtype)
        part = tl.dot(inverse.to(v_CV.dtype), weighed, input_precision=PRECISION, out_dtype=ACC)
        tl.store(y + out * V + columns[None, :], part.to(y.dtype.element_ty), mask=seen)


@triton.jit(do_not_specialize=["T"])
def delta_state_kernel(
    k, w, y, g, s0, h, u, s,
    T, HS, N, k_b, k_t, k_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr, HAS_S0: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One block [K,BV] of one state over all chunks; h takes the state before each, u [B,T,Hs,V] the corrections."""
    b, head = tl.program_id(1) // HS, tl.program_id(1) % HS
    rows, columns = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    kept, place = (rows < K)[:, None] & (columns < V)[None, :], rows[:, None] * V + columns[None, :]
    batch, chunks = b.to(tl.int64), tl.cdiv(T, C)
    k += batch * k_b + (head // N) * k_h
    state = tl.zeros([BK, BV], dtype=ACC)
    if HAS_S0:
        state += tl.load(s0 + (batch * HS + head) * K * V + place, mask=kept, other=0.0).to(ACC)
    for c in range(0, chunks):
        t = c * C + tl.arange(0, C)
        at, real = t.to(tl.int64), t < T
        tl.store(h + ((batch * chunks + c) * HS + head) * K * V + place, state.to(h.dtype.element_ty), mask=kept)
        token, seen = (batch * T + at[:, None]) * HS + head, real[:, None] & (columns < V)[None, :]
        w_CK = tl.load(w + token * K + rows[None, :], mask=real[:, None] & (rows < K)[None, :], other=0.0)
        y_CV = tl.load(y + token * V + columns[None, :], mask=seen, other=0.0)
        known = tl.dot(w_CK, state.to(w_CK.dtype), input_precision=PRECISION, out_dtype=ACC)
        new = (y_CV.to(ACC) - known).to(u.dtype.element_ty)
        tl.store(u + token * V + columns[None, :], new, mask=seen)
        k_KC = tl.load(k + rows[:, None] + at[None, :] * k_t, mask=(rows < K)[:, None] & real[None, :], other=0.0)
        if HAS_G:
            gates = tl.load(g + batch * g_b + at * g_t + head * g_h, mask=real, other=0.0).to(ACC) * LOG2_E
            coarse, fine = gate_sums(gates, ACC)
            total, rest = last_of(coarse, C), last_of(fine, C)
            state *= tl.exp2(total + rest)
            k_KC = (k_KC.to(ACC) * tl.exp2((total - coarse) + (rest - fine))[None, :]).to(k_KC.dtype)
        state = tl.dot(k_KC, new.to(k_KC.dtype), acc=state, input_precision=PRECISION, out_dtype=ACC)
    tl.store(s + (batch * HS + head) * K * V + place, state, mask=kept)


def delta_chunk(
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
    """See `linearize.ops.delta`. The chunk is the kernel's own; `chunk` is for the streamed forms."""
    check_delta(q, k, v, beta, g, s0)
    wide = accumulation_dtype(q.dtype)
    q, k = (normalised(x.to(wide), l2norm).to(x.dtype) if l2norm else x for x in (q, k))
    k, v = _launch.inner_contiguous(k), _launch.inner_contiguous(v)
    w, y = prepare(k, v, beta, g)
    h, u, s = corrections(k, w, y, g, s0)
    return outputs(q, k, u, g, h, scale, chunk=TOKENS), s


def prepare(k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None) -> tuple[Tensor, Tensor]:
    (batch, length, kv_heads, key_dim), value_dim, count = k.shape, v.shape[3], beta.shape[2]
    w, y = k.new_empty(batch, length, count, key_dim), v.new_empty(batch, length, count, value_dim)
    args = (
        k, v, beta, k if g is None else g, w, y, length, count, count // kv_heads,
        *k.stride()[:3], *v.stride()[:3], *beta.stride()[:3], *gate_strides(g),
    )  # fmt: skip
    constants = chunk_constants(k, key_dim, value_dim, g) | exact_products(k)
    grid = (triton.cdiv(length, TOKENS), batch * count)
    _launch.launch(delta_prepare_kernel, lambda config: grid, args, constants, prepare_configs(architecture(k), k))
    return w, y


def corrections(
    k: Tensor, w: Tensor, y: Tensor, g: Tensor | None, s0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(states before each chunk [B,NT,Hs,K,V], corrections u [B,T,Hs,V], last states [B,Hs,K,V])."""
    (batch, length, count, key_dim), value_dim, kv_heads = w.shape, y.shape[3], k.shape[2]
    h = k.new_empty(batch, triton.cdiv(length, TOKENS), count, key_dim, value_dim, dtype=state_dtype(k))
    u, s = y.new_empty(y.shape), k.new_empty(batch, count, key_dim, value_dim, dtype=accumulation_dtype(k.dtype))
    args = (
        k, w, y, k if g is None else g, s if s0 is None else s0.contiguous(), h, u, s,
        length, count, count // kv_heads, *k.stride()[:3], *gate_strides(g),
    )  # fmt: skip
    constants = chunk_constants(k, key_dim, value_dim, g) | {"HAS_S0": s0 is not None, "BK": block(key_dim, 1024)}

    def grid(config: Config) -> tuple[int, ...]:
        return triton.cdiv(value_dim, config.blocks["BV"]), batch * count

    configs = state_configs(architecture(k), k, key_dim, value_dim)
    _launch.launch(delta_state_kernel, grid, args, constants, configs)
    return h, u, s


def chunk_constants(k: Tensor, key_dim: int, value_dim: int, g: Tensor | None) -> dict[str, Any]:
    return shared_constants(k, key_dim, value_dim, g) | {"C": TOKENS}


def exact_products(k: Tensor) -> dict[str, Any]:
    """How many levels the inverse has, and products in which its digits do not get lost."""
    return {"LEVELS": TOKENS.bit_length() - 1, "EXACT": "ieee" if k.element_size() > 2 else "tf32x3"}


def prepare_configs(arch: int, x: Tensor) -> tuple[Config, ...]:
    return (Config(8, 1, {"BK": 16 if x.element_size() > 2 else 32, "BV": 16 if x.element_size() > 2 else 32}),)


def state_configs(arch: int, x: Tensor, key_dim: int, value_dim: int) -> tuple[Config, ...]:
    if x.element_size() > 2:
        return (Config(8, 1, {"BV": 16}),)
    return (Config(4, 2, {"BV": 32}),)
