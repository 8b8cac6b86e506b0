"""`gla_vec_chunk` on a GPU: a state pass over chunks of 64 tokens, then the outputs of every 16 tokens at once.

    state pass    S_{c+1} = diag(e^{total_c}) S_c + (e^{rest} k_c)^T v_c
    output pass   o_i = scale ( (q_i e^{elapsed_i}) S_c + sum_j (q_i e^{from_i}) . (k_j e^{to_j}) v_j + the own 16 )

Letters and shapes as in `linearize.ops.gla_vec`. Token i of a row of 16 reads token j of an earlier row of its chunk
through the border before its row: from_i sums the gates from the border to i, to_j those from j to the border, so both
factors are at most 1 whatever the gates are. Within a row the exponents are made pair by pair.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.triton import _launch
from linearize.kernels.triton._config import CHUNK, Config, architecture, block, state_dtype
from linearize.kernels.triton.gla import COARSE, LEAST, LOG2_E, shared_constants
from linearize.ops._library import accumulation_dtype
from linearize.ops.gla_vec import check_gla_vec

ROW = 16


@triton.jit
def split_gates(g, ACC: tl.constexpr):
    """log2 gates as (multiples of 1/64, remainders): sums of the first and their differences are exact in float32."""
    g = tl.maximum(g.to(ACC) * LOG2_E, LEAST)
    coarse = tl.floor(g * COARSE) / COARSE
    return coarse, g - coarse


@triton.jit(do_not_specialize=["T"])
def gla_vec_state_kernel(
    k, v, g, s0, h, s,
    T, HS, N, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr, HAS_S0: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One block [BK,BV] of one state over all chunks; h [B,NT,Hs,K,V] takes the state before each, s the last."""
    b, head = tl.program_id(2) // HS, tl.program_id(2) % HS
    rows = tl.program_id(0) * BK + tl.arange(0, BK)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    kept, place = (rows < K)[:, None] & (columns < V)[None, :], rows[:, None] * V + columns[None, :]
    batch, chunks = b.to(tl.int64), tl.cdiv(T, C)
    k += batch * k_b + (head // N) * k_h + rows[:, None]
    v += batch * v_b + (head // N) * v_h + columns[None, :]
    g += batch * g_b + head * g_h + rows[:, None]
    state = tl.zeros([BK, BV], dtype=ACC)
    if HAS_S0:
        state += tl.load(s0 + (batch * HS + head) * K * V + place, mask=kept, other=0.0).to(ACC)
    for c in range(0, chunks):
        t = c * C + tl.arange(0, C)
        at, real = t.to(tl.int64), (rows < K)[:, None] & (t < T)[None, :]
        tl.store(h + ((batch * chunks + c) * HS + head) * K * V + place, state.to(h.dtype.element_ty), mask=kept)
        coarse, fine = split_gates(tl.load(g + at[None, :] * g_t, mask=real, other=0.0), ACC)
        total, small = tl.sum(coarse, 1), tl.sum(fine, 1)
        rest = (total[:, None] - tl.cumsum(coarse, 1)) + (small[:, None] - tl.cumsum(fine, 1))
        k_KC = tl.load(k + at[None, :] * k_t, mask=real, other=0.0)
        v_CV = tl.load(v + at[:, None] * v_t, mask=(t < T)[:, None] & (columns < V)[None, :], other=0.0)
        state *= tl.exp2(total + small)[:, None]
        weighed = (k_KC.to(ACC) * tl.exp2(tl.minimum(rest, 0.0))).to(k_KC.dtype)
        state = tl.dot(weighed, v_CV, acc=state, input_precision=PRECISION, out_dtype=ACC)
    tl.store(s + (batch * HS + head) * K * V + place, state, mask=kept)


@triton.jit
def own_row(q, k, coarse, fine, ROWS: tl.constexpr, ACC: tl.constexpr):
    """[16,16] weights of a row of tokens over itself; coarse and fine are running sums of gates [16,BK]."""
    i = tl.arange(0, ROWS)
    weights = tl.zeros([ROWS, ROWS], dtype=ACC)
    for j in range(0, ROWS):
        picked = (i == j)[:, None]
        k_j = tl.sum(tl.where(picked, k, 0.0), 0)
        spans = (coarse - tl.sum(tl.where(picked, coarse, 0.0), 0)[None, :]) + (
            fine - tl.sum(tl.where(picked, fine, 0.0), 0)[None, :]
        )
        seen = (i >= j)[:, None]
        read = tl.sum(tl.where(seen, q * k_j[None, :] * tl.exp2(tl.where(seen, spans, 0.0)), 0.0), 1)
        weights += tl.where((i == j)[None, :], read[:, None], 0.0)
    return weights


@triton.jit(do_not_specialize=["T"])
def gla_vec_output_kernel(
    q, k, v, g, h, o,
    scale, T, H, HS, R, N,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """o [B,T,H,V] of 16 tokens, one query head and one block of value columns."""
    row, b, head = tl.program_id(1), tl.program_id(2) // H, tl.program_id(2) % H
    c, within = row * ROWS // C, row % (C // ROWS)
    state_head, channels = head // (R // N), tl.arange(0, BK)
    columns, i = tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, ROWS)
    batch, t = b.to(tl.int64), row * ROWS + i
    k += batch * k_b + (head // R) * k_h + channels[None, :]
    v += batch * v_b + (head // R) * v_h + columns[None, :]
    g += batch * g_b + state_head * g_h + channels[None, :]
    at, real = t.to(tl.int64)[:, None], (t < T)[:, None] & (channels < K)[None, :]
    q_RK = tl.load(q + batch * q_b + head * q_h + channels[None, :] + at * q_t, mask=real, other=0.0)
    k_RK = tl.load(k + at * k_t, mask=real, other=0.0)
    v_RV = tl.load(v + at * v_t, mask=(t < T)[:, None] & (columns < V)[None, :], other=0.0)
    coarse, fine = split_gates(tl.load(g + at * g_t, mask=real, other=0.0), ACC)
    coarse, fine = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    weights = own_row(q_RK.to(ACC), k_RK.to(ACC), coarse, fine, ROWS, ACC)
    out = tl.dot(weights.to(v_RV.dtype), v_RV, input_precision=PRECISION, out_dtype=ACC)
    reader = q_RK.to(ACC) * tl.exp2(coarse + fine)
    border = tl.zeros([BK], dtype=ACC)
    for back in range(1, within + 1):
        j = t - back * ROWS
        at, real = j.to(tl.int64)[:, None], (channels < K)[None, :] & (j >= 0)[:, None]
        coarse, fine = split_gates(tl.load(g + at * g_t, mask=real, other=0.0), ACC)
        total, small = tl.sum(coarse, 0), tl.sum(fine, 0)
        to = (total[None, :] - tl.cumsum(coarse, 0)) + (small[None, :] - tl.cumsum(fine, 0))
        k_RK = tl.load(k + at * k_t, mask=real, other=0.0)
        v_RV = tl.load(v + at * v_t, mask=(j >= 0)[:, None] & (columns < V)[None, :], other=0.0)
        writer = k_RK.to(ACC) * tl.exp2(tl.minimum(to, 0.0) + border[None, :])
        scores = tl.dot(
            reader.to(k_RK.dtype), tl.trans(writer.to(k_RK.dtype)), input_precision=PRECISION, out_dtype=ACC
        )
        out = tl.dot(scores.to(v_RV.dtype), v_RV, acc=out, input_precision=PRECISION, out_dtype=ACC)
        border += total + small
    h_KV = tl.load(
        h + ((batch * tl.cdiv(T, C) + c) * HS + state_head) * K * V + channels[:, None] * V + columns[None, :],
        mask=(channels < K)[:, None] & (columns < V)[None, :], other=0.0,
    )  # fmt: skip
    reader = (reader * tl.exp2(border)[None, :]).to(h_KV.dtype)
    out = tl.dot(reader, h_KV, acc=out, input_precision=PRECISION, out_dtype=ACC) * scale
    o += ((batch * T + t.to(tl.int64)[:, None]) * H + head) * V + columns[None, :]
    tl.store(o, out.to(o.dtype.element_ty), mask=(t < T)[:, None] & (columns < V)[None, :])


def gla_vec_chunk(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s0: Tensor | None = None, *, scale: float = 1.0, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """See `linearize.ops.gla_vec`. The chunk is the kernel's own; `chunk` is for the streamed forms."""
    check_gla_vec(q, k, v, g, s0)
    q, k, v, g = (_launch.inner_contiguous(x) for x in (q, k, v, g))
    h, s = states(k, v, g, s0, q)
    return _outputs(q, k, v, g, h, scale), s


def states(k: Tensor, v: Tensor, g: Tensor, s0: Tensor | None, like: Tensor) -> tuple[Tensor, Tensor]:
    """(the state before each chunk [B,NT,Hs,K,V], the last [B,Hs,K,V])."""
    (batch, length, kv_heads, key_dim), value_dim, count = k.shape, v.shape[3], g.shape[2]
    h = k.new_empty(batch, triton.cdiv(length, CHUNK), count, key_dim, value_dim, dtype=state_dtype(like))
    s = k.new_empty(batch, count, key_dim, value_dim, dtype=accumulation_dtype(like.dtype))
    args = (
        k, v, g, s if s0 is None else s0.contiguous(), h, s,
        length, count, count // kv_heads, *k.stride()[:3], *v.stride()[:3], *g.stride()[:3],
    )  # fmt: skip
    constants = shared_constants(like, key_dim, value_dim, g) | {"HAS_S0": s0 is not None}

    def grid(config: Config) -> tuple[int, ...]:
        blocks = triton.cdiv(key_dim, config.blocks["BK"]), triton.cdiv(value_dim, config.blocks["BV"])
        return *blocks, batch * count

    configs = state_configs(architecture(like), like, key_dim, value_dim)
    _launch.launch(gla_vec_state_kernel, grid, args, constants, configs)
    return h, s


def _outputs(q: Tensor, k: Tensor, v: Tensor, g: Tensor, h: Tensor, scale: float) -> Tensor:
    (batch, length, heads, key_dim), kv_heads, value_dim, count = q.shape, k.shape[2], v.shape[3], g.shape[2]
    o = q.new_empty(batch, length, heads, value_dim)
    args = (
        q, k, v, g, h, o, scale, length, heads, count, heads // kv_heads, count // kv_heads,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *g.stride()[:3],
    )  # fmt: skip
    constants = shared_constants(q, key_dim, value_dim, g) | {"ROWS": ROW, "BK": block(key_dim, 1024)}

    def grid(config: Config) -> tuple[int, ...]:
        return triton.cdiv(value_dim, config.blocks["BV"]), triton.cdiv(length, ROW), batch * heads

    _launch.launch(gla_vec_output_kernel, grid, args, constants, output_configs(architecture(q), q, value_dim))
    return o


def state_configs(arch: int, x: Tensor, key_dim: int, value_dim: int) -> tuple[Config, ...]:
    sizes = {"BK": block(key_dim, 32), "BV": block(value_dim, 32)}
    return (Config(8, 1, sizes) if x.element_size() > 2 else Config(4, 2, sizes),)


def output_configs(arch: int, x: Tensor, value_dim: int) -> tuple[Config, ...]:
    return (Config(4, 1, {"BV": block(value_dim, 32 if x.element_size() > 2 else 64)}),)
