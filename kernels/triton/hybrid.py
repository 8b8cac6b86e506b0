"""`hybrid_chunk` on a GPU: the states of the far field chunk by chunk, then window, sinks and far field in one kernel.

Letters and shapes as in `linearize.ops.hybrid`; C = 64 queries a program, the keys they see are indices c C to
c C + C + w - 1 of the delay line. The softmax is online, in units of log2; the far sums are added under its final
maximum, since that is part of the function. Of the first C of these, those up to a query's own have left its window.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.triton import _launch
from linearize.kernels.triton._blocks import add_logit, attend, weigh
from linearize.kernels.triton._config import CHUNK, Config, accumulator, architecture, block, precision, state_dtype
from linearize.kernels.triton.gla import LOG2_E
from linearize.ops._library import accumulation_dtype
from linearize.ops.hybrid import States, check_hybrid


@triton.jit(do_not_specialize=["T"])
def hybrid_state_kernel(
    fk, v, mask, s0, z0, h, hz, s, z,
    T, G, f_b, f_t, f_h, v_b, v_t, v_h, m_b,
    F: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_S0: tl.constexpr, HAS_Z0: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BF: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """One block [BF,BV] of s over all chunks; the programs of the first block of values carry z as well."""
    b, head = tl.program_id(2) // G, tl.program_id(2) % G
    rows = tl.program_id(0) * BF + tl.arange(0, BF)
    columns = tl.program_id(1) * BV + tl.arange(0, BV)
    kept, inside = (rows < F)[:, None] & (columns < V)[None, :], rows < F
    place = rows[:, None] * V + columns[None, :]
    batch, chunks = b.to(tl.int64), tl.cdiv(T, C)
    fk += batch * f_b + head * f_h
    v += batch * v_b + head * v_h
    state, total = tl.zeros([BF, BV], dtype=ACC), tl.zeros([BF], dtype=ACC)
    if HAS_S0:
        state += tl.load(s0 + (batch * G + head) * F * V + place, mask=kept, other=0.0).to(ACC)
    if HAS_Z0:
        total += tl.load(z0 + (batch * G + head) * F + rows, mask=inside, other=0.0).to(ACC)
    for c in range(0, chunks):
        t = c * C + tl.arange(0, C)
        at, here = t.to(tl.int64), (batch * chunks + c) * G + head
        tl.store(h + here * F * V + place, state.to(h.dtype.element_ty), mask=kept)
        if tl.program_id(1) == 0:
            tl.store(hz + here * F + rows, total, mask=inside)
        exists = tl.load(mask + batch * m_b + at, mask=t < T, other=0) != 0
        f_FC = tl.load(fk + rows[:, None] + at[None, :] * f_t, mask=inside[:, None] & exists[None, :], other=0.0)
        real = exists[:, None] & (columns < V)[None, :]
        v_CV = tl.load(v + at[:, None] * v_t + columns[None, :], mask=real, other=0.0)
        state = weigh(f_FC, v_CV, state, ACC, PRECISION)
        total += tl.sum(f_FC.to(ACC), 1)
    tl.store(s + (batch * G + head) * F * V + place, state, mask=kept)
    if tl.program_id(1) == 0:
        tl.store(z + (batch * G + head) * F + rows, total, mask=inside)


@triton.jit(do_not_specialize=["T"])
def hybrid_output_kernel(
    q, k, v, mask, fq, fk, mix, sink_k, sink_v, sink_mask, sink_logits, h, hz, o, tops, masses,
    scale, T, H, R, M, LOGITS, window,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, m_b, fq_b, fq_t, fq_h, fk_b, fk_t, fk_h,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr, C: tl.constexpr,
    HAS_FAR: tl.constexpr, HAS_MIX: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LOGITS: tl.constexpr,
    KEEP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BF: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """o [B,T,H,V] of one chunk of queries, one head and one block of value columns; where the backward asks for them,
    the maxima (log2) and denominators [B,T,H] as well."""
    c, b, head = tl.program_id(1), tl.program_id(2) // H, tl.program_id(2) % H
    batch, kv_head = b.to(tl.int64), head // R
    columns, dims = tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, BD)
    i = tl.arange(0, C)
    t = c * C + i
    at, real = t.to(tl.int64), t < T
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    q_CD = tl.load(
        q + batch * q_b + head * q_h + at[:, None] * q_t + dims[None, :],
        mask=real[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    unit = tl.full([], LOG2_E, dtype=ACC) * scale
    top, mass = tl.full([C], float("-inf"), dtype=ACC), tl.zeros([C], dtype=ACC)
    out = tl.zeros([C, BV], dtype=ACC)
    for start in range(0, C + window, BN):
        j = c * C + start + tl.arange(0, BN)
        line = j.to(tl.int64)
        exists = tl.load(mask + batch * m_b + line, mask=j < T + window, other=0) != 0
        k_DN = tl.load(k + dims[:, None] + line[None, :] * k_t, mask=(dims < D)[:, None] & exists[None, :], other=0.0)
        v_NV = tl.load(
            v + line[:, None] * v_t + columns[None, :], mask=exists[:, None] & (columns < V)[None, :], other=0.0
        )
        seen = (j[None, :] > t[:, None]) & (j[None, :] <= t[:, None] + window) & exists[None, :]
        scores = tl.dot(q_CD, k_DN, input_precision=PRECISION, out_dtype=ACC) * unit
        top, mass, out = attend(tl.where(seen, scores, float("-inf")), v_NV, top, mass, out, ACC, PRECISION)
    if HAS_SINKS:
        m = tl.arange(0, BM)
        held = (m < M)[:, None]
        key = (batch * M + m) * (H // R) + kv_head
        k_DM = tl.load(
            sink_k + key[None, :] * D + dims[:, None], mask=(dims < D)[:, None] & (m < M)[None, :], other=0.0
        )
        v_MV = tl.load(sink_v + key[:, None] * V + columns[None, :], mask=held & (columns < V)[None, :], other=0.0)
        seen = tl.load(
            sink_mask + (batch * T + at[:, None]) * M + m[None, :], mask=real[:, None] & (m < M)[None, :], other=0
        )
        scores = tl.dot(q_CD, k_DM, input_precision=PRECISION, out_dtype=ACC) * unit
        top, mass, out = attend(tl.where(seen != 0, scores, float("-inf")), v_MV, top, mass, out, ACC, PRECISION)
    if HAS_LOGITS:
        for n in range(0, LOGITS):
            logit = tl.load(sink_logits + head * LOGITS + n).to(ACC) * LOG2_E
            top, mass, out = add_logit(logit, top, mass, out)
    if HAS_MIX:
        share = tl.load(mix + head).to(ACC)
        mass *= share
        out *= share
    if HAS_FAR:
        fq += batch * fq_b + head * fq_h + at[:, None] * fq_t
        fk += batch * fk_b + kv_head * fk_h + at[None, :] * fk_t
        here = (batch * tl.cdiv(T, C) + c) * (H // R) + kv_head
        left = tl.load(mask + batch * m_b + at, mask=real, other=0) != 0
        weights = tl.zeros([C, C], dtype=ACC)
        for start in range(0, F, BF):
            f = start + tl.arange(0, BF)
            fq_CF = tl.load(fq + f[None, :], mask=real[:, None] & (f < F)[None, :], other=0.0)
            fk_FC = tl.load(fk + f[:, None], mask=(f < F)[:, None] & left[None, :], other=0.0)
            h_FV = tl.load(
                h + here * F * V + f[:, None] * V + columns[None, :],
                mask=(f < F)[:, None] & (columns < V)[None, :], other=0.0,
            )  # fmt: skip
            z_F = tl.load(hz + here * F + f, mask=f < F, other=0.0)
            weights = tl.dot(fq_CF, fk_FC, acc=weights, input_precision=PRECISION, out_dtype=ACC)
            out = tl.dot(fq_CF.to(h_FV.dtype), h_FV, acc=out, input_precision=PRECISION, out_dtype=ACC)
            mass += tl.sum(fq_CF.to(ACC) * z_F[None, :], 1)
        weights = tl.where(i[:, None] >= i[None, :], weights, 0.0)
        v_CV = tl.load(v + at[:, None] * v_t + columns[None, :], mask=left[:, None] & (columns < V)[None, :], other=0.0)
        out = weigh(weights, v_CV, out, ACC, PRECISION)
        mass += tl.sum(weights, 1)
    if KEEP:
        tl.store(tops + (batch * T + at) * H + head, top, mask=real)  # every block of columns finds the same
        tl.store(masses + (batch * T + at) * H + head, mass, mask=real)
    out = out / tl.where(mass == 0.0, 1.0, mass)[:, None]
    o += ((batch * T + at[:, None]) * H + head) * V + columns[None, :]
    tl.store(o, out.to(o.dtype.element_ty), mask=real[:, None] & (columns < V)[None, :])


def hybrid_chunk(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    fq: Tensor | None = None,
    fk: Tensor | None = None,
    mix: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
    s0: Tensor | None = None,
    z0: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> States:
    """See `linearize.ops.hybrid`."""
    check_hybrid(q, k, v, mask, (fq, fk), (sink_k, sink_v, sink_mask), window)
    sinks = (sink_k, sink_v, sink_mask, sink_logits, mix)
    o = q.new_empty(*q.shape[:3], v.shape[3])
    s, z = forward(q, k, v, mask, fq, fk, sinks, s0, z0, o, None, window, scale)
    return o, s, z


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    fq: Tensor | None,
    fk: Tensor | None,
    sinks: Sequence[Tensor | None],
    s0: Tensor | None,
    z0: Tensor | None,
    o: Tensor,
    sums: tuple[Tensor, Tensor] | None,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The last states; writes o, and to `sums` the maxima (log2) and denominators [B,T,H] where they are wanted.

    `sinks` are sink_k, sink_v, sink_mask, sink_logits and mix.
    """
    q, k, v, mask = (_launch.inner_contiguous(x) for x in (q, k, v, mask))
    wide, features = accumulation_dtype(q.dtype), 0 if fk is None else fk.shape[3]
    s = q.new_empty(q.shape[0], k.shape[2], features, v.shape[3], dtype=wide)
    z, h, hz = q.new_empty(q.shape[0], k.shape[2], features, dtype=wide), q, q
    if fq is not None and fk is not None:
        fq, fk = (_launch.inner_contiguous(x.to(fq.dtype)) for x in (fq, fk))
        h, hz = _states(fk, v, mask, s0, z0, s, z)
    given = [x if x is None else x.contiguous() for x in sinks]
    _outputs(q, k, v, mask, fq, fk, given, h, hz, o, sums, window, scale)
    return s, z


def _states(
    fk: Tensor, v: Tensor, mask: Tensor, s0: Tensor | None, z0: Tensor | None, s: Tensor, z: Tensor
) -> tuple[Tensor, Tensor]:
    """Writes the last states to s and z; returns those before each chunk, [B,NT,G,F,V] and [B,NT,G,F]."""
    (batch, length, kv_heads, features), value_dim = fk.shape, v.shape[3]
    chunks = triton.cdiv(length, CHUNK)
    h = fk.new_empty(batch, chunks, kv_heads, features, value_dim, dtype=state_dtype(fk))
    hz = fk.new_empty(batch, chunks, kv_heads, features, dtype=s.dtype)
    args = (
        fk, v, mask, s if s0 is None else s0.contiguous(), z if z0 is None else z0.contiguous(), h, hz, s, z,
        length, kv_heads, *fk.stride()[:3], *v.stride()[:3], mask.stride(0),
    )  # fmt: skip
    constants = {
        "F": features, "V": value_dim, "C": CHUNK, "HAS_S0": s0 is not None, "HAS_Z0": z0 is not None,
        "ACC": accumulator(fk), "PRECISION": precision(fk),
    }  # fmt: skip

    def grid(config: Config) -> tuple[int, ...]:
        blocks = triton.cdiv(features, config.blocks["BF"]), triton.cdiv(value_dim, config.blocks["BV"])
        return *blocks, batch * kv_heads

    _launch.launch(
        hybrid_state_kernel, grid, args, constants, state_configs(architecture(fk), fk, features, value_dim)
    )
    return h, hz


def _outputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    fq: Tensor | None,
    fk: Tensor | None,
    sinks: Sequence[Tensor | None],
    h: Tensor,
    hz: Tensor,
    o: Tensor,
    sums: tuple[Tensor, Tensor] | None,
    window: int,
    scale: float,
) -> None:
    batch, length, heads, kv_heads = *q.shape[:3], k.shape[2]
    sink_k, sink_v, sink_mask, sink_logits, mix = sinks
    given = [q if x is None else x for x in (fq, fk, mix, sink_k, sink_v, sink_mask, sink_logits)]
    count, logits = (0 if sink_k is None else sink_k.shape[1]), (0 if sink_logits is None else sink_logits.shape[1])
    args = (
        q, k, v, mask, *given, h, hz, o, *(sums or (o, o)),
        scale, length, heads, heads // kv_heads, count, logits, window,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], mask.stride(0),
        *given[0].stride()[:3], *given[1].stride()[:3],
    )  # fmt: skip
    features, value_dim = (0 if fk is None else fk.shape[3]), v.shape[3]
    constants: dict[str, Any] = {
        "D": q.shape[3], "V": value_dim, "F": features, "C": CHUNK, "HAS_FAR": fq is not None,
        "HAS_MIX": mix is not None, "HAS_SINKS": count > 0, "HAS_LOGITS": logits > 0, "KEEP": sums is not None,
        "ACC": accumulator(q), "PRECISION": precision(q), "BD": block(q.shape[3], 1024), "BM": block(count, 1024),
    }  # fmt: skip

    def grid(config: Config) -> tuple[int, ...]:
        return triton.cdiv(value_dim, config.blocks["BV"]), triton.cdiv(length, CHUNK), batch * heads

    configs = output_configs(architecture(q), q, value_dim, features)
    _launch.launch(hybrid_output_kernel, grid, args, constants, configs)


def state_configs(arch: int, x: Tensor, features: int, value_dim: int) -> tuple[Config, ...]:
    wide = 64 if x.element_size() <= 2 else 32
    return (Config(4, 3 if arch >= 90 else 2, {"BF": block(features, wide), "BV": block(value_dim, wide)}),)


def output_configs(arch: int, x: Tensor, value_dim: int, features: int) -> tuple[Config, ...]:
    if x.element_size() > 2:
        return (Config(8, 1, {"BV": block(value_dim, 32), "BF": 16, "BN": 16}),)
    sizes = {"BV": block(value_dim, 128), "BF": block(features, 32), "BN": 64}
    return (Config(4 if value_dim <= 64 else 8, 2, sizes),)
