"""The backward of `delta_chunk` on a GPU: forward states again, their gradients in reverse, then parallel passes.

With S_c the state before chunk c, dS_c the gradient of the state after it, letters as in `delta.py` beside this:

    du = (k q^T * D^T) do scale + e^{rest} k dS_c           p = X^T du,   dv = b p
    dS_{c-1} = e^{total_c} dS_c + scale (e^{elapsed} q)^T do - w^T du
    r_i = e^{elapsed_i} S p_i + sum_{j < i} D_ij (p_i.u_j) k_j         what token i's correction reads of the past
    dq = scale ( e^{elapsed} S do + (do u^T * D) k )
    dk = e^{rest} dS_c u + scale (u do^T * D^T) q - (u dv^T * D^T, i > j) k - b r
    db = p.v - k.r

A token is two readers: its query, of the upstream gradient do, and its key, of -dv and of earlier tokens alone; so the
passes are those of `gla_backward.py`, with u for the values. The gates' gradient as there: what a token reads, less
what it wrote. X^T is made as the inverse of the transposed system: Triton 3.4 to 3.7.0 miscompile a transposed result
of a product that feeds a product on Hopper (flash-linear-attention #640, #826).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.triton import _launch
from linearize.kernels.triton._config import Config, architecture, block
from linearize.kernels.triton.delta import (
    TOKENS,
    chunk_constants,
    corrections,
    exact_products,
    prepare,
    prepare_configs,
    unit_inverse,
)
from linearize.kernels.triton.gla import LOG2_E, gate_strides, gate_sums, last_of, outputs
from linearize.kernels.triton.gla_backward import gate_gradient, reverse
from linearize.ops._library import accumulation_dtype
from linearize.ops.delta import NORM_EPSILON, normalised


@triton.jit(do_not_specialize=["T"])
def delta_gradient_state_kernel(
    q, k, w, do, g, h, s, ds, du, dh, ds0, dot_sums,
    scale, T, H, HS, N, SHARED,
    q_b, q_t, q_h, k_b, k_t, k_h, do_b, do_t, do_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr, HAS_DS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One block [K,BV] of dS over all chunks, last to first. du [B,T,Hs,V] holds the outputs' part of du and takes what
    the later states add; dot_sums [blocks,B,NT,Hs] takes its share of <S, dS>."""
    b, head = tl.program_id(1) // HS, tl.program_id(1) % HS
    rows, columns = tl.arange(0, BK), tl.program_id(0) * BV + tl.arange(0, BV)
    kept, place = (rows < K)[:, None] & (columns < V)[None, :], rows[:, None] * V + columns[None, :]
    batch, chunks = b.to(tl.int64), tl.cdiv(T, C)
    whole = (batch * HS + head) * K * V + place
    k += batch * k_b + (head // N) * k_h
    gradient = tl.zeros([BK, BV], dtype=ACC)
    if HAS_DS:
        gradient += tl.load(ds + whole, mask=kept, other=0.0).to(ACC)
    after = tl.load(s + whole, mask=kept, other=0.0).to(ACC)
    for back in range(0, chunks):
        c = chunks - 1 - back
        here = (batch * chunks + c) * HS + head
        tl.store(dh + here * K * V + place, gradient.to(dh.dtype.element_ty), mask=kept)
        sums = dot_sums + tl.program_id(0) * (tl.num_programs(1) * chunks) + here
        tl.store(sums, tl.sum(tl.sum(after * gradient, 1), 0))
        after = tl.load(h + here * K * V + place, mask=kept, other=0.0).to(ACC)
        t = c * C + tl.arange(0, C)
        at, real = t.to(tl.int64), t < T
        coarse, fine = tl.zeros([C], dtype=ACC), tl.zeros([C], dtype=ACC)
        if HAS_G:
            gates = tl.load(g + batch * g_b + at * g_t + head * g_h, mask=real, other=0.0).to(ACC) * LOG2_E
            coarse, fine = gate_sums(gates, ACC)
        total, small = last_of(coarse, C), last_of(fine, C)
        token, seen = (batch * T + at) * HS + head, real[:, None] & (columns < V)[None, :]
        k_CK = tl.load(k + at[:, None] * k_t + rows[None, :], mask=real[:, None] & (rows < K)[None, :], other=0.0)
        leaving = (k_CK.to(ACC) * tl.exp2((total - coarse) + (small - fine))[:, None]).to(k_CK.dtype)
        du_CV = tl.load(du + token[:, None] * V + columns[None, :], mask=seen, other=0.0).to(ACC)
        du_CV = tl.dot(leaving, gradient.to(k_CK.dtype), acc=du_CV, input_precision=PRECISION, out_dtype=ACC)
        tl.store(du + token[:, None] * V + columns[None, :], du_CV.to(du.dtype.element_ty), mask=seen)
        gradient *= tl.exp2(total + small)
        w_KC = tl.load(w + token[None, :] * K + rows[:, None], mask=(rows < K)[:, None] & real[None, :], other=0.0)
        gradient -= tl.dot(w_KC, du_CV.to(w_KC.dtype), input_precision=PRECISION, out_dtype=ACC)
        for r in range(0, SHARED):
            reader = head * SHARED + r
            q_KC = tl.load(
                q + batch * q_b + reader * q_h + rows[:, None] + at[None, :] * q_t,
                mask=(rows < K)[:, None] & real[None, :], other=0.0,
            )  # fmt: skip
            do_CV = tl.load(
                do + batch * do_b + reader * do_h + at[:, None] * do_t + columns[None, :], mask=seen, other=0.0
            )
            weighed = (q_KC.to(ACC) * (tl.exp2(coarse + fine) * scale)[None, :]).to(q_KC.dtype)
            gradient = tl.dot(weighed, do_CV, acc=gradient, input_precision=PRECISION, out_dtype=ACC)
    tl.store(ds0 + whole, gradient, mask=kept)


@triton.jit(do_not_specialize=["T"])
def delta_solve_kernel(
    k, beta, g, du, p, dv,
    T, HS, N, k_b, k_t, k_h, b_b, b_t, b_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, LEVELS: tl.constexpr, HAS_G: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, EXACT: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """p = X^T du and dv = b p, [B,T,Hs,V], of one chunk and state."""
    c, b, head = tl.program_id(0), tl.program_id(1) // HS, tl.program_id(1) % HS
    i, batch = tl.arange(0, C), b.to(tl.int64)
    t = c * C + i
    at, real = t.to(tl.int64), t < T
    k += batch * k_b + (head // N) * k_h
    weight = tl.load(beta + batch * b_b + at * b_t + head * b_h, mask=real, other=0.0).to(ACC)
    upper = tl.zeros([C, C], dtype=ACC)
    for first in range(0, K, BK):
        rows = first + tl.arange(0, BK)
        k_CK = tl.load(k + at[:, None] * k_t + rows[None, :], mask=real[:, None] & (rows < K)[None, :], other=0.0)
        k_KC = tl.load(k + rows[:, None] + at[None, :] * k_t, mask=(rows < K)[:, None] & real[None, :], other=0.0)
        upper = tl.dot(k_CK, k_KC, acc=upper, input_precision=PRECISION, out_dtype=ACC)
    after = i[:, None] < i[None, :]
    if HAS_G:
        gates = tl.load(g + batch * g_b + at * g_t + head * g_h, mask=real, other=0.0).to(ACC) * LOG2_E
        coarse, fine = gate_sums(gates, ACC)
        spans = (coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None])
        upper *= tl.exp2(tl.where(after, spans, 0.0))
    inverse = unit_inverse(tl.where(after, upper * weight[None, :], 0.0), C, LEVELS, ACC, EXACT)
    out = ((batch * T + at[:, None]) * HS + head) * V
    for first in range(0, V, BV):
        columns = first + tl.arange(0, BV)
        seen = real[:, None] & (columns < V)[None, :]
        du_CV = tl.load(du + out + columns[None, :], mask=seen, other=0.0)
        part = tl.dot(inverse.to(du_CV.dtype), du_CV, input_precision=PRECISION, out_dtype=ACC)
        tl.store(p + out + columns[None, :], part.to(p.dtype.element_ty), mask=seen)
        tl.store(dv + out + columns[None, :], (part * weight[:, None]).to(dv.dtype.element_ty), mask=seen)


def from_autograd(
    inputs: Sequence[Any], gradients: Sequence[Tensor | None], needed: Sequence[bool], keywords: dict[str, Any]
) -> list[Tensor | None]:
    """`delta_backward` on what the operator's autograd holds: inputs (q, k, v, beta, g, s0), some may be missing."""
    given, wanted = [*inputs, None, None][:6], [*needed, False, False][:6]
    q, v, (do, ds) = given[0], given[2], gradients
    if do is None:
        do = q.new_zeros(1).expand(*q.shape[:3], v.shape[3])
    call: list[Any] = [*given, do, ds, keywords.get("scale", 1.0), keywords.get("l2norm", False)]
    found = delta_backward(*call)
    return [x if need else None for x, need in zip(found, wanted, strict=True)][: len(inputs)]


def delta_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s0: Tensor | None,
    do: Tensor,
    ds: Tensor | None,
    scale: float = 1.0,
    l2norm: bool = False,
) -> tuple[Tensor | None, ...]:
    """Gradients of q, k, v, beta, g and s0 from those of o [B,T,H,V] and of the last state."""
    given_q, given_k, wide = q, k, accumulation_dtype(q.dtype)
    q, k = (normalised(x.to(wide), l2norm).to(x.dtype) if l2norm else x for x in (q, k))
    q, k, v, do = (_launch.inner_contiguous(x) for x in (q, k, v, do.to(q.dtype)))
    count, kv_heads = beta.shape[2], k.shape[2]
    w, y = prepare(k, v, beta, g)
    h, u, s = corrections(k, w, y, g, s0)
    du = reverse(k, q, do, g, count, None, scale, q.dtype, chunk=TOKENS)
    dh, ds0, dot_sums = _gradient_states(q, k, w, do, g, h, s, ds, du, scale)
    p, dv = _solve(k, beta, g, du)
    old = h.transpose(3, 4)
    dq = outputs(do, u, k, g, old, scale, dtype=wide, chunk=TOKENS)
    known = outputs(p, u, k, g, old, 1.0, dtype=wide, chunk=TOKENS, strict=True)
    written = reverse(u, do, q, g, count, dh.transpose(3, 4), scale, wide, chunk=TOKENS)
    written -= reverse(u, dv, k, g, count, None, 1.0, wide, chunk=TOKENS, strict=True)
    by_state = count // kv_heads
    keys, values = (x.repeat_interleave(by_state, 2) if by_state > 1 else x for x in (k, v))
    read = (keys * known).sum(-1)
    dbeta = (p.to(wide) * values).sum(-1) - read
    dg = None
    if g is not None:
        change = (q * dq).sum(-1).unflatten(2, (count, -1)).sum(3) - beta * read - (keys * written).sum(-1)
        dg = gate_gradient(change, dot_sums, TOKENS).to(g.dtype)
    dk = written - beta[..., None] * known
    dk, dv = (x.unflatten(2, (kv_heads, -1)).sum(3) if by_state > 1 else x for x in (dk, dv))
    dq, dk = (
        (_through_norm(x, dx) if l2norm else dx).to(x.dtype) for x, dx in ((given_q, dq), (given_k, dk))
    )
    return dq, dk, dv.to(v.dtype), dbeta.to(beta.dtype), dg, None if s0 is None else ds0.to(s0.dtype)


def _through_norm(x: Tensor, dy: Tensor) -> Tensor:
    """The gradient of x from that of y = x / |x|: (dy - y (y.dy)) / |x|."""
    x = x.to(dy.dtype)
    inverse = torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + NORM_EPSILON)
    y = x * inverse
    return inverse * (dy - y * (y * dy).sum(dim=-1, keepdim=True))


def _gradient_states(
    q: Tensor, k: Tensor, w: Tensor, do: Tensor, g: Tensor | None, h: Tensor, s: Tensor, ds: Tensor | None,
    du: Tensor, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dS after each chunk [B,NT,Hs,K,V], before the first [B,Hs,K,V], <S, dS> after each chunk; completes du."""
    (batch, length, heads, key_dim), value_dim, count = q.shape, do.shape[3], s.shape[1]
    dh, ds0 = torch.empty_like(h), torch.empty_like(s)
    configs = gradient_state_configs(architecture(q), q)
    blocks = triton.cdiv(value_dim, configs[0].blocks["BV"])
    dot_sums = s.new_empty(blocks, batch, h.shape[1], count)
    args = (
        q, k, w, do, q if g is None else g, h, s, s if ds is None else ds.to(s.dtype).contiguous(),
        du, dh, ds0, dot_sums, scale, length, heads, count, count // k.shape[2], heads // count,
        *q.stride()[:3], *k.stride()[:3], *do.stride()[:3], *gate_strides(g),
    )  # fmt: skip
    constants = chunk_constants(q, key_dim, value_dim, g) | {"HAS_DS": ds is not None, "BK": block(key_dim, 1024)}
    _launch.launch(delta_gradient_state_kernel, lambda config: (blocks, batch * count), args, constants, configs)
    return dh, ds0, dot_sums.sum(0)


def _solve(k: Tensor, beta: Tensor, g: Tensor | None, du: Tensor) -> tuple[Tensor, Tensor]:
    (batch, length, count, value_dim), kv_heads, key_dim = du.shape, k.shape[2], k.shape[3]
    p, dv = torch.empty_like(du), torch.empty_like(du)
    args = (
        k, beta, k if g is None else g, du, p, dv, length, count, count // kv_heads,
        *k.stride()[:3], *beta.stride()[:3], *gate_strides(g),
    )  # fmt: skip
    constants = chunk_constants(k, key_dim, value_dim, g) | exact_products(k)
    grid = (triton.cdiv(length, TOKENS), batch * count)
    _launch.launch(delta_solve_kernel, lambda config: grid, args, constants, prepare_configs(architecture(k), k))
    return p, dv


def gradient_state_configs(arch: int, x: Tensor) -> tuple[Config, ...]:
    if x.element_size() > 2:
        return (Config(8, 1, {"BV": 16}),)
    return (Config(4, 2, {"BV": 32}),)
