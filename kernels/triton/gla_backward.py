"""The backward of `gla_chunk` on a GPU: states forward again, their gradients in reverse, then three parallel passes.

With S_c the state before chunk c and dS_c the gradient of the state after it, letters as in `gla.py` beside this:

    dS_{c-1} = e^{total_c} dS_c + scale (e^{elapsed} q_c)^T do_c
    dq = scale ( e^{elapsed} do S^T + (do v^T * D) k )              the output pass with do, v, k for q, k, v
    dk = e^{rest} v dS^T + scale (v do^T * D^T) q                   the reverse pass with v, do, q for x, y, z
    dv = e^{rest} k dS   + scale (k q^T * D^T) do                   the reverse pass with k, q, do
    dg_t = sum over the chunk's i >= t of (q_i.dq_i - k_i.dk_i) + <S_{c+1}, dS_c>

Sums over the query heads of a state run within a program, in one order: no atomics, the same bits every time.
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
from linearize.kernels.triton.gla import (
    LOG2_E,
    gate_strides,
    gate_sums,
    last_of,
    outputs,
    shared_constants,
    states,
)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]


@triton.jit(do_not_specialize=["T"])
def gla_gradient_state_kernel(
    q, do, g, h, s, ds, dh, ds0, dot_sums,
    scale, T, H, HS, SHARED,
    q_b, q_t, q_h, do_b, do_t, do_h, g_b, g_t, g_h,
    K: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr, HAS_DS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One block [BK,BV] of dS over all chunks, last to first; dot_sums [blocks,B,NT,Hs] takes its share of <S, dS>."""
    b, head = tl.program_id(2) // HS, tl.program_id(2) % HS
    rows = tl.program_id(0) * BK + tl.arange(0, BK)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    kept = (rows < K)[:, None] & (columns < V)[None, :]
    place = rows[:, None] * V + columns[None, :]
    batch, chunks = b.to(tl.int64), tl.cdiv(T, C)
    whole = (batch * HS + head) * K * V + place
    block_id = tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)
    gradient = tl.zeros([BK, BV], dtype=ACC)
    if HAS_DS:
        gradient += tl.load(ds + whole, mask=kept, other=0.0).to(ACC)
    after = tl.load(s + whole, mask=kept, other=0.0).to(ACC)
    for back in range(0, chunks):
        c = chunks - 1 - back
        here = (batch * chunks + c) * HS + head
        tl.store(dh + here * K * V + place, gradient.to(dh.dtype.element_ty), mask=kept)
        sums = dot_sums + block_id * (tl.num_programs(2) * chunks) + here
        tl.store(sums, tl.sum(tl.sum(after * gradient, 1), 0))
        after = tl.load(h + here * K * V + place, mask=kept, other=0.0).to(ACC)
        t = c * C + tl.arange(0, C)
        at, real = t.to(tl.int64), t < T
        coarse, fine = tl.zeros([C], dtype=ACC), tl.zeros([C], dtype=ACC)
        if HAS_G:
            gates = tl.load(g + batch * g_b + at * g_t + head * g_h, mask=real, other=0.0).to(ACC) * LOG2_E
            coarse, fine = gate_sums(gates, ACC)
            gradient *= tl.exp2(last_of(coarse, C) + last_of(fine, C))
        for r in range(0, SHARED):
            reader = head * SHARED + r
            q_KC = tl.load(
                q + batch * q_b + reader * q_h + rows[:, None] + at[None, :] * q_t,
                mask=(rows < K)[:, None] & real[None, :], other=0.0,
            )  # fmt: skip
            do_CV = tl.load(
                do + batch * do_b + reader * do_h + at[:, None] * do_t + columns[None, :],
                mask=real[:, None] & (columns < V)[None, :], other=0.0,
            )  # fmt: skip
            weighed = (q_KC.to(ACC) * (tl.exp2(coarse + fine) * scale)[None, :]).to(q_KC.dtype)
            gradient = tl.dot(weighed, do_CV, acc=gradient, input_precision=PRECISION, out_dtype=ACC)
    tl.store(ds0 + whole, gradient, mask=kept)


@triton.jit(do_not_specialize=["T"])
def gla_reverse_kernel(
    x, y, z, g, h, out,
    scale, T, HS, N, SHARED, PER_Z,
    x_b, x_t, x_h, y_b, y_t, y_h, z_b, z_t, z_h, g_b, g_t, g_h, h_x, h_z,
    X: tl.constexpr, Z: tl.constexpr, C: tl.constexpr, HAS_G: tl.constexpr, HAS_H: tl.constexpr, STRICT: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BX: tl.constexpr, BZ: tl.constexpr,
):  # fmt: skip
    """out_j = e^{rest_j} x_j M + scale sum_{i >= j, heads} (x_j.y_i) D_ij z_i, [B,T,Hs,Z], of one chunk and state.

    Without HAS_H the part of M is 0; STRICT sums over i > j.
    """
    c, b, head = tl.program_id(1), tl.program_id(2) // HS, tl.program_id(2) % HS
    columns, j = tl.program_id(0) * BZ + tl.arange(0, BZ), tl.arange(0, C)
    batch, t = b.to(tl.int64), c * C + j
    at, real = t.to(tl.int64), t < T
    x += batch * x_b + (head // N) * x_h
    h += ((batch * tl.cdiv(T, C) + c) * HS + head) * X * Z
    result = tl.zeros([C, BZ], dtype=ACC)
    if HAS_H:
        for first in range(0, X, BX):
            rows = first + tl.arange(0, BX)
            x_CX = tl.load(x + at[:, None] * x_t + rows[None, :], mask=real[:, None] & (rows < X)[None, :], other=0.0)
            h_XZ = tl.load(
                h + rows[:, None] * h_x + columns[None, :] * h_z,
                mask=(rows < X)[:, None] & (columns < Z)[None, :], other=0.0,
            )  # fmt: skip
            result = tl.dot(x_CX.to(h_XZ.dtype), h_XZ, acc=result, input_precision=PRECISION, out_dtype=ACC)
    later = (j[:, None] < j[None, :]) if STRICT else (j[:, None] <= j[None, :])
    decay = tl.where(later, tl.full([C, C], 1.0, dtype=ACC), 0.0)
    if HAS_G:
        gates = tl.load(g + batch * g_b + at * g_t + head * g_h, mask=real, other=0.0).to(ACC) * LOG2_E
        coarse, fine = gate_sums(gates, ACC)
        result *= tl.exp2((last_of(coarse, C) - coarse) + (last_of(fine, C) - fine))[:, None]
        spans = (coarse[None, :] - coarse[:, None]) + (fine[None, :] - fine[:, None])
        decay *= tl.exp2(tl.where(later, spans, 0.0))
    for r in range(0, SHARED):
        y_r = y + batch * y_b + (head * SHARED + r) * y_h
        scores = tl.zeros([C, C], dtype=ACC)
        for first in range(0, X, BX):
            rows = first + tl.arange(0, BX)
            x_CX = tl.load(x + at[:, None] * x_t + rows[None, :], mask=real[:, None] & (rows < X)[None, :], other=0.0)
            y_XC = tl.load(y_r + rows[:, None] + at[None, :] * y_t, mask=(rows < X)[:, None] & real[None, :], other=0.0)
            scores = tl.dot(x_CX, y_XC, acc=scores, input_precision=PRECISION, out_dtype=ACC)
        z_CZ = tl.load(
            z + batch * z_b + ((head * SHARED + r) // PER_Z) * z_h + at[:, None] * z_t + columns[None, :],
            mask=real[:, None] & (columns < Z)[None, :], other=0.0,
        )  # fmt: skip
        weights = (scores * decay * scale).to(z_CZ.dtype)
        result = tl.dot(weights, z_CZ, acc=result, input_precision=PRECISION, out_dtype=ACC)
    out += ((batch * T + at[:, None]) * HS + head) * Z + columns[None, :]
    tl.store(out, result.to(out.dtype.element_ty), mask=real[:, None] & (columns < Z)[None, :])


def from_autograd(
    inputs: Sequence[Any], gradients: Sequence[Tensor | None], needed: Sequence[bool], keywords: dict[str, Any]
) -> list[Tensor | None]:
    """`gla_backward` on what the operator's autograd holds: inputs (q, k, v, g, s0), some may be missing."""
    given, wanted = [*inputs, None, None][:5], [*needed, False, False][:5]
    q, k, v, g, s0 = given
    do, ds = gradients
    if do is None:
        do = q.new_zeros(1).expand(*q.shape[:3], v.shape[3])
    found = gla_backward(q, k, v, g, s0, do, ds, keywords.get("scale", 1.0), wanted[3])
    return [x if need else None for x, need in zip(found, wanted, strict=True)][: len(inputs)]


def gla_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    s0: Tensor | None,
    do: Tensor,
    ds: Tensor | None,
    scale: float = 1.0,
    gates: bool = True,
) -> Gradients:
    """Gradients of q, k, v, g and s0 from those of o [B,T,H,V] and of the last state; g's only where `gates`."""
    q, k, v, do = (_launch.inner_contiguous(x) for x in (q, k, v, do.to(q.dtype)))
    h, s = states(k, v, g, s0, q)
    dh, ds0, dot_sums = _gradient_states(q, do, g, h, s, ds, scale)
    wide = s.dtype if gates and g is not None else q.dtype  # the gates' gradient is a difference of these
    dq = outputs(do, v, k, g, h.transpose(3, 4), scale, dtype=wide)
    dk = reverse(v, do, q, g, s.shape[1], dh.transpose(3, 4), scale, wide)
    dv = reverse(k, q, do, g, s.shape[1], dh, scale, v.dtype)
    dg = None
    if gates and g is not None:
        per_kv = s.shape[1] // k.shape[2]
        change = (q * dq).sum(-1).unflatten(2, (s.shape[1], -1)).sum(3) - (k.repeat_interleave(per_kv, 2) * dk).sum(-1)
        dg = gate_gradient(change, dot_sums, CHUNK).to(g.dtype)
    kv_heads = k.shape[2]
    dk, dv = (x.unflatten(2, (kv_heads, -1)).sum(3) if x.shape[2] > kv_heads else x for x in (dk, dv))
    return dq.to(q.dtype), dk.to(k.dtype), dv, dg, None if s0 is None else ds0.to(s0.dtype)


def _gradient_states(
    q: Tensor, do: Tensor, g: Tensor | None, h: Tensor, s: Tensor, ds: Tensor | None, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """dS after each chunk [B,NT,Hs,K,V], before the first [B,Hs,K,V], and <S, dS> after each chunk [B,NT,Hs]."""
    (batch, length, heads, key_dim), value_dim, count = q.shape, do.shape[3], s.shape[1]
    dh, ds0 = torch.empty_like(h), torch.empty_like(s)
    configs = _gradient_state_configs(architecture(q), q, key_dim, value_dim)
    blocks = [triton.cdiv(d, configs[0].blocks[name]) for d, name in ((key_dim, "BK"), (value_dim, "BV"))]
    dot_sums = s.new_empty(blocks[0] * blocks[1], batch, h.shape[1], count)
    args = (
        q, do, q if g is None else g, h, s, s if ds is None else ds.to(s.dtype).contiguous(), dh, ds0, dot_sums,
        scale, length, heads, count, heads // count, *q.stride()[:3], *do.stride()[:3], *gate_strides(g),
    )  # fmt: skip
    constants = shared_constants(q, key_dim, value_dim, g) | {"HAS_DS": ds is not None}
    grid = (*blocks, batch * count)
    _launch.launch(gla_gradient_state_kernel, lambda config: grid, args, constants, configs)
    return dh, ds0, dot_sums.sum(0)


def reverse(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    g: Tensor | None,
    count: int,
    dh: Tensor | None,
    scale: float,
    dtype: torch.dtype,
    chunk: int = CHUNK,
    strict: bool = False,
) -> Tensor:
    """`gla_reverse_kernel`: [B,T,Hs,Z] for Hs = `count` states, dh [B,NT,Hs,X,Z] for M."""
    (batch, length, x_heads, inner), outer, heads = x.shape, z.shape[3], y.shape[2]
    out = x.new_empty(batch, length, count, outer, dtype=dtype)
    args = (
        x, y, z, x if g is None else g, x if dh is None else dh, out,
        scale, length, count, count // x_heads, heads // count, heads // z.shape[2],
        *x.stride()[:3], *y.stride()[:3], *z.stride()[:3], *gate_strides(g),
        *(dh.stride()[3:] if dh is not None else (0, 0)),
    )  # fmt: skip
    constants: dict[str, Any] = {
        "X": inner, "Z": outer, "C": chunk, "HAS_G": g is not None, "HAS_H": dh is not None, "STRICT": strict,
        "ACC": accumulator(x), "PRECISION": precision(x),
    }  # fmt: skip

    def grid(config: Config) -> tuple[int, ...]:
        return triton.cdiv(outer, config.blocks["BZ"]), triton.cdiv(length, chunk), batch * count

    _launch.launch(gla_reverse_kernel, grid, args, constants, _reverse_configs(architecture(x), x, inner, outer))
    return out


def gate_gradient(change: Tensor, dot_sums: Tensor, size: int) -> Tensor:
    """dg_t [B,T,Hs,..] = sum over i >= t of t's chunk of change_i [B,T,Hs,..], and dot_sums [B,NT,Hs,..] of the chunk.

    A gate weighs what its token and later ones read of earlier ones: all that they read, less what they wrote.
    """
    length, chunks = change.shape[1], dot_sums.shape[1]
    filled = change.new_zeros(change.shape[0], chunks * size, *change.shape[2:])
    filled[:, :length] = change
    by_chunk = filled.unflatten(1, (chunks, size))
    summed = by_chunk.flip(2).cumsum(2).flip(2) + dot_sums[:, :, None]
    return summed.flatten(1, 2)[:, :length].contiguous()


def _gradient_state_configs(arch: int, x: Tensor, key_dim: int, value_dim: int) -> tuple[Config, ...]:
    if x.element_size() > 2:
        return (Config(8, 1, {"BK": block(key_dim, 32), "BV": block(value_dim, 32)}),)
    return (Config(4, 2, {"BK": block(key_dim, 64), "BV": block(value_dim, 64)}),)


def _reverse_configs(arch: int, x: Tensor, inner: int, outer: int) -> tuple[Config, ...]:
    if x.element_size() > 2:
        return (Config(8, 1, {"BX": 16, "BZ": block(outer, 32)}),)
    return (Config(4 if outer <= 64 and arch >= 90 else 8, 2, {"BX": block(inner, 64), "BZ": block(outer, 128)}),)
