"""The backward of `gla_vec_chunk` on a GPU: states forward again, their gradients in reverse, three parallel passes.

With S_c the state before chunk c and dS_c the gradient of the state after it, letters as in `gla_vec.py` beside this:

    dS_{c-1} = diag(e^{total_c}) dS_c + scale (e^{elapsed} q)^T do
    dq_i = scale ( e^{elapsed_i} * (S do_i) + sum_{j <= i} (do_i.v_j) e^{g_{j+1} + .. + g_i} * k_j )
    dk_j = e^{rest_j} * (dS v_j) + scale sum_{i >= j} (do_i.v_j) e^{g_{j+1} + .. + g_i} * q_i
    dv_j = dS^T (e^{rest_j} * k_j) + scale sum_{i >= j} (q_i . e^{g_{j+1} + .. + g_i} * k_j) do_i
    dg_t = sum over the chunk's i >= t of (q_i * dq_i - k_i * dk_i) + the row sums of S_{c+1} * dS_c

A program takes 16 tokens of one chunk. As in the output pass a pair of tokens of different rows meets at a border
between them, so that both factors are at most 1; pairs of a row's own are made one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.triton import _launch
from linearize.kernels.triton._config import CHUNK, Config, accumulator, architecture, block, precision
from linearize.kernels.triton.gla import shared_constants
from linearize.kernels.triton.gla_backward import gate_gradient
from linearize.kernels.triton.gla_vec import ROW, split_gates, states


@triton.jit(do_not_specialize=["T"])
def gla_vec_gradient_state_kernel(
    q, do, g, h, s, ds, dh, ds0, dot_sums,
    scale, T, H, HS, SHARED, q_b, q_t, q_h, do_b, do_t, do_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr, HAS_DS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One block [BK,BV] of dS over all chunks, last to first; dot_sums [blocks of V,B,NT,Hs,K] takes rows of S * dS."""
    b, head = tl.program_id(2) // HS, tl.program_id(2) % HS
    rows = tl.program_id(0) * BK + tl.arange(0, BK)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    kept, place = (rows < K)[:, None] & (columns < V)[None, :], rows[:, None] * V + columns[None, :]
    batch, chunks = b.to(tl.int64), tl.cdiv(T, C)
    whole = (batch * HS + head) * K * V + place
    gradient = tl.zeros([BK, BV], dtype=ACC)
    if HAS_DS:
        gradient += tl.load(ds + whole, mask=kept, other=0.0).to(ACC)
    after = tl.load(s + whole, mask=kept, other=0.0).to(ACC)
    sums = dot_sums + tl.program_id(1) * (tl.num_programs(2) * chunks * K)
    for back in range(0, chunks):
        c = chunks - 1 - back
        here = (batch * chunks + c) * HS + head
        tl.store(dh + here * K * V + place, gradient.to(dh.dtype.element_ty), mask=kept)
        tl.store(sums + here * K + rows, tl.sum(after * gradient, 1), mask=rows < K)
        after = tl.load(h + here * K * V + place, mask=kept, other=0.0).to(ACC)
        t = c * C + tl.arange(0, C)
        at, real = t.to(tl.int64), (rows < K)[:, None] & (t < T)[None, :]
        gates = g + batch * g_b + head * g_h + rows[:, None] + at[None, :] * g_t
        coarse, fine = split_gates(tl.load(gates, mask=real, other=0.0), ACC)
        gradient *= tl.exp2(tl.sum(coarse, 1) + tl.sum(fine, 1))[:, None]
        elapsed = tl.exp2(tl.cumsum(coarse, 1) + tl.cumsum(fine, 1)) * scale
        for r in range(0, SHARED):
            reader = head * SHARED + r
            q_KC = tl.load(q + batch * q_b + reader * q_h + rows[:, None] + at[None, :] * q_t, mask=real, other=0.0)
            do_CV = tl.load(
                do + batch * do_b + reader * do_h + at[:, None] * do_t + columns[None, :],
                mask=(t < T)[:, None] & (columns < V)[None, :], other=0.0,
            )  # fmt: skip
            weighed = (q_KC.to(ACC) * elapsed).to(q_KC.dtype)
            gradient = tl.dot(weighed, do_CV, acc=gradient, input_precision=PRECISION, out_dtype=ACC)
    tl.store(ds0 + whole, gradient, mask=kept)


@triton.jit
def products(a, b, at_a, at_b, a_t, b_t, real_a, real_b, V: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
             PRECISION: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """[16,16] products of rows of a with rows of b, over all V columns."""
    found = tl.zeros([ROWS, ROWS], dtype=ACC)
    for first in range(0, V, BV):
        columns = first + tl.arange(0, BV)
        a_RV = tl.load(
            a + at_a[:, None] * a_t + columns[None, :], mask=real_a[:, None] & (columns < V)[None, :], other=0.0
        )
        b_VR = tl.load(
            b + at_b[None, :] * b_t + columns[:, None], mask=(columns < V)[:, None] & real_b[None, :], other=0.0
        )
        found = tl.dot(a_RV, b_VR, acc=found, input_precision=PRECISION, out_dtype=ACC)
    return found


@triton.jit
def through_state(x, at, x_t, h, real, rows, V: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, ACC: tl.constexpr,
                  PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr):  # fmt: skip
    """[16,BK]: rows of x [.., V] times the transpose of a state [K,V]."""
    found = tl.zeros([ROWS, BK], dtype=ACC)
    for first in range(0, V, BV):
        columns = first + tl.arange(0, BV)
        x_RV = tl.load(x + at[:, None] * x_t + columns[None, :], mask=real[:, None] & (columns < V)[None, :], other=0.0)
        h_VK = tl.load(
            h + rows[None, :] * V + columns[:, None], mask=(columns < V)[:, None] & (rows < K)[None, :], other=0.0
        )
        found = tl.dot(x_RV.to(h_VK.dtype), h_VK, acc=found, input_precision=PRECISION, out_dtype=ACC)
    return found


@triton.jit
def picked(x, i, j):
    """Row j of x [16,..]."""
    return tl.sum(tl.where((i == j)[:, None], x, 0.0), 0)


@triton.jit(do_not_specialize=["T"])
def gla_vec_dq_kernel(
    k, v, g, do, h, dq,
    scale, T, H, HS, R, N, k_b, k_t, k_h, v_b, v_t, v_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dq [B,T,H,K] of 16 tokens, one query head and one block of channels."""
    row, b, head = tl.program_id(1), tl.program_id(2) // H, tl.program_id(2) % H
    c, within, i = row * ROWS // C, row % (C // ROWS), tl.arange(0, ROWS)
    state_head, batch, t = head // (R // N), b.to(tl.int64), row * ROWS + i
    channels = tl.program_id(0) * BK + tl.arange(0, BK)
    inside, real, at = (channels < K)[None, :], t < T, t.to(tl.int64)
    k += batch * k_b + (head // R) * k_h + channels[None, :]
    v += batch * v_b + (head // R) * v_h
    g += batch * g_b + state_head * g_h + channels[None, :]
    do += batch * do_b + head * do_h
    coarse, fine = split_gates(tl.load(g + at[:, None] * g_t, mask=real[:, None] & inside, other=0.0), ACC)
    coarse, fine = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    weights = products(do, v, at, at, do_t, v_t, real, real, V, ROWS, ACC, PRECISION, BV)
    mine = tl.load(k + at[:, None] * k_t, mask=real[:, None] & inside, other=0.0).to(ACC)
    own, far, border = tl.zeros([ROWS, BK], dtype=ACC), tl.zeros([ROWS, BK], dtype=ACC), tl.zeros([BK], dtype=ACC)
    for j in range(0, ROWS):
        spans = (coarse - picked(coarse, i, j)[None, :]) + (fine - picked(fine, i, j)[None, :])
        weight = tl.sum(tl.where((i == j)[None, :], weights, 0.0), 1)
        decay = tl.exp2(tl.where((i >= j)[:, None], spans, 0.0)) * tl.where(i >= j, weight, 0.0)[:, None]
        own += decay * picked(mine, i, j)[None, :]
    for back in range(1, within + 1):
        line = (t - back * ROWS).to(tl.int64)
        past = line >= 0
        gates = tl.load(g + line[:, None] * g_t, mask=past[:, None] & inside, other=0.0)
        first, second = split_gates(gates, ACC)
        total, small = tl.sum(first, 0), tl.sum(second, 0)
        to = (total[None, :] - tl.cumsum(first, 0)) + (small[None, :] - tl.cumsum(second, 0))
        k_RK = tl.load(k + line[:, None] * k_t, mask=past[:, None] & inside, other=0.0)
        writer = (k_RK.to(ACC) * tl.exp2(tl.minimum(to, 0.0) + border[None, :])).to(k_RK.dtype)
        weights = products(do, v, at, line, do_t, v_t, real, past, V, ROWS, ACC, PRECISION, BV)
        far = tl.dot(weights.to(k_RK.dtype), writer, acc=far, input_precision=PRECISION, out_dtype=ACC)
        border += total + small
    h += ((batch * tl.cdiv(T, C) + c) * HS + state_head) * K * V
    old = through_state(do, at, do_t, h, real, channels, V, K, ROWS, ACC, PRECISION, BK, BV)
    out = (own + tl.exp2(coarse + fine) * (far + tl.exp2(border)[None, :] * old)) * scale
    dq += ((batch * T + at[:, None]) * H + head) * K + channels[None, :]
    tl.store(dq, out.to(dq.dtype.element_ty), mask=real[:, None] & inside)


@triton.jit(do_not_specialize=["T"])
def gla_vec_dk_kernel(
    q, v, g, do, dh, dk,
    scale, T, HS, SHARED, N, q_b, q_t, q_h, v_b, v_t, v_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dk [B,T,Hs,K] of 16 tokens, one state and one block of channels."""
    row, b, head = tl.program_id(1), tl.program_id(2) // HS, tl.program_id(2) % HS
    c, ahead, i = row * ROWS // C, C // ROWS - 1 - row % (C // ROWS), tl.arange(0, ROWS)
    batch, t, channels = b.to(tl.int64), row * ROWS + i, tl.program_id(0) * BK + tl.arange(0, BK)
    inside, real, at = (channels < K)[None, :], t < T, t.to(tl.int64)
    q += batch * q_b + channels[None, :]
    v += batch * v_b + (head // N) * v_h
    g += batch * g_b + head * g_h + channels[None, :]
    do += batch * do_b
    coarse, fine = split_gates(tl.load(g + at[:, None] * g_t, mask=real[:, None] & inside, other=0.0), ACC)
    total, small = tl.sum(coarse, 0), tl.sum(fine, 0)
    coarse, fine = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    to = tl.exp2(tl.minimum((total[None, :] - coarse) + (small[None, :] - fine), 0.0))
    own, far, border = tl.zeros([ROWS, BK], dtype=ACC), tl.zeros([ROWS, BK], dtype=ACC), tl.zeros([BK], dtype=ACC)
    for r in range(0, SHARED):
        reader = head * SHARED + r
        weights = products(v, do + reader * do_h, at, at, v_t, do_t, real, real, V, ROWS, ACC, PRECISION, BV)
        q_RK = tl.load(q + reader * q_h + at[:, None] * q_t, mask=real[:, None] & inside, other=0.0).to(ACC)
        for j in range(0, ROWS):
            spans = (picked(coarse, i, j)[None, :] - coarse) + (picked(fine, i, j)[None, :] - fine)
            weight = tl.sum(tl.where((i == j)[None, :], weights, 0.0), 1)
            decay = tl.exp2(tl.where((i <= j)[:, None], spans, 0.0)) * tl.where(i <= j, weight, 0.0)[:, None]
            own += decay * picked(q_RK, i, j)[None, :]
    for forth in range(1, ahead + 1):
        line = (t + forth * ROWS).to(tl.int64)
        there = line < T
        first, second = split_gates(tl.load(g + line[:, None] * g_t, mask=there[:, None] & inside, other=0.0), ACC)
        decay = tl.exp2(tl.cumsum(first, 0) + tl.cumsum(second, 0) + border[None, :])
        for r in range(0, SHARED):
            reader = head * SHARED + r
            q_RK = tl.load(q + reader * q_h + line[:, None] * q_t, mask=there[:, None] & inside, other=0.0)
            weights = products(v, do + reader * do_h, at, line, v_t, do_t, real, there, V, ROWS, ACC, PRECISION, BV)
            weighed = (q_RK.to(ACC) * decay).to(q_RK.dtype)
            far = tl.dot(weights.to(q_RK.dtype), weighed, acc=far, input_precision=PRECISION, out_dtype=ACC)
        border += tl.sum(first, 0) + tl.sum(second, 0)
    dh += ((batch * tl.cdiv(T, C) + c) * HS + head) * K * V
    new = through_state(v, at, v_t, dh, real, channels, V, K, ROWS, ACC, PRECISION, BK, BV)
    out = own * scale + to * (far * scale + tl.exp2(border)[None, :] * new)
    dk += ((batch * T + at[:, None]) * HS + head) * K + channels[None, :]
    tl.store(dk, out.to(dk.dtype.element_ty), mask=real[:, None] & inside)


@triton.jit
def read_by(q, k, coarse, fine, ROWS: tl.constexpr, ACC: tl.constexpr):
    """[16,16]: how much token j of a row (the second) reads of token i; running sums of gates [16,BK]."""
    i = tl.arange(0, ROWS)
    weights = tl.zeros([ROWS, ROWS], dtype=ACC)
    for j in range(0, ROWS):
        spans = (picked(coarse, i, j)[None, :] - coarse) + (picked(fine, i, j)[None, :] - fine)
        seen = (i <= j)[:, None]
        read = tl.sum(tl.where(seen, k * picked(q, i, j)[None, :] * tl.exp2(tl.where(seen, spans, 0.0)), 0.0), 1)
        weights += tl.where((i == j)[None, :], read[:, None], 0.0)
    return weights


@triton.jit(do_not_specialize=["T"])
def gla_vec_dv_kernel(
    q, k, g, do, dh, dv,
    scale, T, HS, SHARED, N, q_b, q_t, q_h, k_b, k_t, k_h, g_b, g_t, g_h, do_b, do_t, do_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr, ROWS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """dv [B,T,Hs,V] of 16 tokens, one state and one block of columns; BK holds all channels."""
    row, b, head = tl.program_id(1), tl.program_id(2) // HS, tl.program_id(2) % HS
    c, ahead, i = row * ROWS // C, C // ROWS - 1 - row % (C // ROWS), tl.arange(0, ROWS)
    batch, t, channels = b.to(tl.int64), row * ROWS + i, tl.arange(0, BK)
    columns, real, at = tl.program_id(0) * BV + tl.arange(0, BV), t < T, t.to(tl.int64)
    inside = (channels < K)[None, :]
    q += batch * q_b + channels[None, :]
    g += batch * g_b + head * g_h + channels[None, :]
    do += batch * do_b + columns[None, :]
    k_RK = tl.load(
        k + batch * k_b + (head // N) * k_h + channels[None, :] + at[:, None] * k_t,
        mask=real[:, None] & inside, other=0.0,
    )  # fmt: skip
    coarse, fine = split_gates(tl.load(g + at[:, None] * g_t, mask=real[:, None] & inside, other=0.0), ACC)
    total, small = tl.sum(coarse, 0), tl.sum(fine, 0)
    coarse, fine = tl.cumsum(coarse, 0), tl.cumsum(fine, 0)
    writer = k_RK.to(ACC) * tl.exp2(tl.minimum((total[None, :] - coarse) + (small[None, :] - fine), 0.0))
    out, border = tl.zeros([ROWS, BV], dtype=ACC), tl.zeros([BK], dtype=ACC)
    for r in range(0, SHARED):
        reader = head * SHARED + r
        q_RK = tl.load(q + reader * q_h + at[:, None] * q_t, mask=real[:, None] & inside, other=0.0)
        do_RV = tl.load(
            do + reader * do_h + at[:, None] * do_t, mask=real[:, None] & (columns < V)[None, :], other=0.0
        )
        weights = read_by(q_RK.to(ACC), k_RK.to(ACC), coarse, fine, ROWS, ACC) * scale
        out = tl.dot(weights.to(do_RV.dtype), do_RV, acc=out, input_precision=PRECISION, out_dtype=ACC)
    for forth in range(1, ahead + 1):
        line = (t + forth * ROWS).to(tl.int64)
        there = line < T
        first, second = split_gates(tl.load(g + line[:, None] * g_t, mask=there[:, None] & inside, other=0.0), ACC)
        decay = tl.exp2(tl.cumsum(first, 0) + tl.cumsum(second, 0) + border[None, :]) * scale
        for r in range(0, SHARED):
            reader = head * SHARED + r
            q_RK = tl.load(q + reader * q_h + line[:, None] * q_t, mask=there[:, None] & inside, other=0.0)
            do_RV = tl.load(
                do + reader * do_h + line[:, None] * do_t, mask=there[:, None] & (columns < V)[None, :], other=0.0
            )
            weighed = tl.trans((q_RK.to(ACC) * decay).to(q_RK.dtype))
            weights = tl.dot(writer.to(q_RK.dtype), weighed, input_precision=PRECISION, out_dtype=ACC)
            out = tl.dot(weights.to(do_RV.dtype), do_RV, acc=out, input_precision=PRECISION, out_dtype=ACC)
        border += tl.sum(first, 0) + tl.sum(second, 0)
    dh_KV = tl.load(
        dh + ((batch * tl.cdiv(T, C) + c) * HS + head) * K * V + channels[:, None] * V + columns[None, :],
        mask=(channels < K)[:, None] & (columns < V)[None, :], other=0.0,
    )  # fmt: skip
    leaving = (writer * tl.exp2(border)[None, :]).to(dh_KV.dtype)
    out = tl.dot(leaving, dh_KV, acc=out, input_precision=PRECISION, out_dtype=ACC)
    dv += ((batch * T + at[:, None]) * HS + head) * V + columns[None, :]
    tl.store(dv, out.to(dv.dtype.element_ty), mask=real[:, None] & (columns < V)[None, :])


def from_autograd(
    inputs: Sequence[Any], gradients: Sequence[Tensor | None], needed: Sequence[bool], keywords: dict[str, Any]
) -> list[Tensor | None]:
    """`gla_vec_backward` on what the operator's autograd holds: inputs (q, k, v, g, s0), s0 may be missing."""
    given, wanted = [*inputs, None][:5], [*needed, False][:5]
    q, v, (do, ds) = given[0], given[2], gradients
    if do is None:
        do = q.new_zeros(1).expand(*q.shape[:3], v.shape[3])
    call: list[Any] = [*given, do, ds, keywords.get("scale", 1.0)]
    found = gla_vec_backward(*call)
    return [x if need else None for x, need in zip(found, wanted, strict=True)][: len(inputs)]


def gla_vec_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s0: Tensor | None,
    do: Tensor,
    ds: Tensor | None,
    scale: float = 1.0,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, g and s0 from those of o [B,T,H,V] and of the last state."""
    q, k, v, g, do = (_launch.inner_contiguous(x) for x in (q, k, v, g, do.to(q.dtype)))
    kv_heads, count = k.shape[2], g.shape[2]
    h, s = states(k, v, g, s0, q)
    dh, ds0, dot_sums = _gradient_states(q, do, g, h, s, ds, scale)
    dq = _by_channel(gla_vec_dq_kernel, (k, v, g, do, h), q.shape[2], (count, q.shape[2] // kv_heads), s, scale)
    shared = q.shape[2] // count
    dk = _by_channel(gla_vec_dk_kernel, (q, v, g, do, dh), count, (shared,), s, scale)
    dv = _values(q, k, g, do, dh, scale)
    read = (q * dq).unflatten(2, (count, shared)).sum(3)
    by_state = count // kv_heads
    dg = gate_gradient(read - (k.repeat_interleave(by_state, 2) if by_state > 1 else k) * dk, dot_sums, CHUNK)
    dk, dv = (x.unflatten(2, (kv_heads, -1)).sum(3) if by_state > 1 else x for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv, dg.to(g.dtype), None if s0 is None else ds0.to(s0.dtype)


def _gradient_states(
    q: Tensor, do: Tensor, g: Tensor, h: Tensor, s: Tensor, ds: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dS after each chunk [B,NT,Hs,K,V], before the first [B,Hs,K,V], rows of S * dS after each chunk [B,NT,Hs,K]."""
    (batch, length, heads, key_dim), value_dim, count = q.shape, do.shape[3], s.shape[1]
    dh, ds0 = torch.empty_like(h), torch.empty_like(s)
    configs = gradient_state_configs(architecture(q), q, key_dim, value_dim)
    blocks = [triton.cdiv(d, configs[0].blocks[name]) for d, name in ((key_dim, "BK"), (value_dim, "BV"))]
    dot_sums = s.new_empty(blocks[1], batch, h.shape[1], count, key_dim)
    args = (
        q, do, g, h, s, s if ds is None else ds.to(s.dtype).contiguous(), dh, ds0, dot_sums,
        scale, length, heads, count, heads // count, *q.stride()[:3], *do.stride()[:3], *g.stride()[:3],
    )  # fmt: skip
    constants = shared_constants(q, key_dim, value_dim, g) | {"HAS_DS": ds is not None}
    grid = (*blocks, batch * count)
    _launch.launch(gla_vec_gradient_state_kernel, lambda config: grid, args, constants, configs)
    return dh, ds0, dot_sums.sum(0)


def _by_channel(
    kernel: Any, tensors: Sequence[Tensor], out_heads: int, counts: tuple[int, ...], s: Tensor, scale: float
) -> Tensor:
    """dq or dk [B,T,H or Hs,K], in the states' dtype, since the gates' gradient is a difference of the two."""
    x, v, g, do, h = tensors
    batch, length, key_dim, value_dim = *do.shape[:2], g.shape[3], v.shape[3]
    out = s.new_empty(batch, length, out_heads, key_dim)
    strides = [step for y in (x, v, g, do) for step in y.stride()[:3]]
    heads = (out_heads, *counts, g.shape[2] // v.shape[2])
    args = (x, v, g, do, h, out, scale, length, *heads, *strides)

    def grid(config: Config) -> tuple[int, ...]:
        return triton.cdiv(key_dim, config.blocks["BK"]), triton.cdiv(length, ROW), batch * out_heads

    constants = shared_constants(do, key_dim, value_dim, g) | {"ROWS": ROW}
    writers = kernel is gla_vec_dk_kernel
    _launch.launch(kernel, grid, args, constants, channel_configs(architecture(do), do, key_dim, value_dim, writers))
    return out


def _values(q: Tensor, k: Tensor, g: Tensor, do: Tensor, dh: Tensor, scale: float) -> Tensor:
    """dv [B,T,Hs,V]."""
    (batch, length, heads, key_dim), value_dim, count = q.shape, do.shape[3], g.shape[2]
    dv = q.new_empty(batch, length, count, value_dim)
    strides = [step for x in (q, k, g, do) for step in x.stride()[:3]]
    args = (q, k, g, do, dh, dv, scale, length, count, heads // count, count // k.shape[2], *strides)
    constants: dict[str, Any] = {
        "K": key_dim, "V": value_dim, "C": CHUNK, "HAS_G": True, "ROWS": ROW, "ACC": accumulator(q),
        "PRECISION": precision(q), "BK": block(key_dim, 1024),
    }  # fmt: skip

    def grid(config: Config) -> tuple[int, ...]:
        return triton.cdiv(value_dim, config.blocks["BV"]), triton.cdiv(length, ROW), batch * count

    _launch.launch(gla_vec_dv_kernel, grid, args, constants, value_configs(architecture(q), q, value_dim))
    return dv


def gradient_state_configs(arch: int, x: Tensor, key_dim: int, value_dim: int) -> tuple[Config, ...]:
    return (Config(8, 1, {"BK": block(key_dim, 32), "BV": block(value_dim, 32)}),)


def channel_configs(arch: int, x: Tensor, key_dim: int, value_dim: int, writers: bool) -> tuple[Config, ...]:
    """Blocks of channels are all the parallelism within a row, and a row's own pairs need the registers."""
    if x.element_size() > 2:
        return (Config(8 if writers and arch < 90 else 4, 1, {"BK": 16, "BV": 16}),)
    return (Config(4, 1, {"BK": block(key_dim, 32), "BV": block(value_dim, 64)}),)


def value_configs(arch: int, x: Tensor, value_dim: int) -> tuple[Config, ...]:
    return (Config(4, 1, {"BV": block(value_dim, 32 if x.element_size() > 2 else 64)}),)
