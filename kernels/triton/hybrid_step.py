"""`hybrid_step` on a GPU: window, sinks, far field, the rings' new entry and the fold of the state in one launch.

Letters and shapes as in `linearize.ops.hybrid_step`. A program serves one row and kv head: its R query heads are the
rows of every product, filled up to 16. Positions are read on the device, so that the launch can stand in a CUDA graph.
The state is read at every step and written at the steps that fold, one in w. All reads of the rings come before the
barrier, the new entry after it: it takes the place of the oldest, which a fold still reads.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.triton import _launch
from linearize.kernels.triton._blocks import add_logit, attend, weigh
from linearize.kernels.triton._config import Config, accumulator, architecture, block, precision
from linearize.kernels.triton.gla import LOG2_E
from linearize.ops.hybrid_step import check_hybrid_step


@triton.jit
def read_pending(
    fq, ring_f, ring_v, out, mass, real, ring, p, window, M, G,
    F: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BR: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """(out, mass) after the tokens that left the window and are not folded yet, at most w."""
    columns = tl.arange(0, BV)
    folded = tl.maximum(window * (p // window - 1), 0)
    for start in range(folded, p - window + 1, BN):
        rank = start + tl.arange(0, BN)
        seen = (rank >= M) & (rank <= p - window)
        place = ring + (rank % (2 * window)) * G
        weights = tl.zeros([BR, BN], dtype=ACC)
        for first in range(0, F, BF):
            f = first + tl.arange(0, BF)
            fq_RF = tl.load(fq + f[None, :], mask=real[:, None] & (f < F)[None, :], other=0.0)
            f_FN = tl.load(
                ring_f + place[None, :] * F + f[:, None], mask=(f < F)[:, None] & seen[None, :], other=0.0
            )
            weights = tl.dot(fq_RF, f_FN.to(fq_RF.dtype), acc=weights, input_precision=PRECISION, out_dtype=ACC)
        v_NV = tl.load(
            ring_v + place[:, None] * V + columns[None, :], mask=seen[:, None] & (columns < V)[None, :], other=0.0
        )
        out = weigh(weights, v_NV, out, ACC, PRECISION)
        mass += tl.sum(weights, 1)
    return out, mass


@triton.jit
def read_state(
    fq, ring_f, ring_v, s, z, out, mass, real, ring, p, window, M, G,
    F: tl.constexpr, V: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BV: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """(out, mass) after the folded tokens; at every w-th token the w oldest of the ring are folded first."""
    columns = tl.arange(0, BV)
    folds = (p % window == 0) & (p >= 2 * window)
    for first in range(0, F, BF):
        f = first + tl.arange(0, BF)
        inside, kept = f < F, (f < F)[:, None] & (columns < V)[None, :]
        state, total = s + f[:, None] * V + columns[None, :], z + f
        s_FV, z_F = tl.load(state, mask=kept, other=0.0), tl.load(total, mask=inside, other=0.0)
        if folds:
            for start in range(0, window, BN):
                rank = p - 2 * window + start + tl.arange(0, BN)
                seen = (rank >= M) & (rank < p - window)
                place = ring + (rank % (2 * window)) * G
                f_FN = tl.load(
                    ring_f + place[None, :] * F + f[:, None], mask=inside[:, None] & seen[None, :], other=0.0
                )
                v_NV = tl.load(
                    ring_v + place[:, None] * V + columns[None, :],
                    mask=seen[:, None] & (columns < V)[None, :], other=0.0,
                )  # fmt: skip
                s_FV = weigh(f_FN, v_NV, s_FV, ACC, PRECISION)
                z_F += tl.sum(f_FN.to(ACC), 1)
            tl.store(state, s_FV, mask=kept)
            tl.store(total, z_F, mask=inside)
        fq_RF = tl.load(fq + f[None, :], mask=real[:, None] & inside[None, :], other=0.0).to(ACC)
        out = tl.dot(fq_RF, s_FV, acc=out, input_precision=PRECISION, out_dtype=ACC)
        mass += tl.sum(fq_RF * z_F[None, :], 1)
    return out, mass


@triton.jit
def write_feature(fk, ring_f, F: tl.constexpr, BF: tl.constexpr):
    """The token's feature takes its place in the ring."""
    for first in range(0, F, BF):
        f = first + tl.arange(0, BF)
        tl.store(ring_f + f, tl.load(fk + f, mask=f < F, other=0.0).to(ring_f.dtype.element_ty), mask=f < F)


@triton.jit
def write_sink(
    sink_k, sink_v, k_D, v_V, first, p, M, G, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr
):
    """One of the first M tokens is kept for good."""
    dims, columns = tl.arange(0, BD), tl.arange(0, BV)
    if p < M:
        key = first + p * G
        tl.store(sink_k + key * D + dims, k_D.to(sink_k.dtype.element_ty), mask=dims < D)
        tl.store(sink_v + key * V + columns, v_V.to(sink_v.dtype.element_ty), mask=columns < V)


@triton.jit
def hybrid_step_kernel(
    q, k, v, fq, fk, pos, ring_k, ring_v, ring_f, s, z, mix, sink_k, sink_v, sink_logits, index, o,
    scale, window, G, R, M, LOGITS,
    q_b, q_h, k_b, k_h, v_b, v_h, fq_b, fq_h, fk_b, fk_h,
    D: tl.constexpr, V: tl.constexpr, F: tl.constexpr,
    HAS_FAR: tl.constexpr, HAS_MIX: tl.constexpr, HAS_SINKS: tl.constexpr, HAS_LOGITS: tl.constexpr,
    HAS_INDEX: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BR: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BF: tl.constexpr,
):  # fmt: skip
    """o [B,1,H,V] of the query heads of one row and kv head."""
    b, head = tl.program_id(0) // G, tl.program_id(0) % G
    batch, size = b.to(tl.int64), 2 * window
    owner = batch
    if HAS_INDEX:
        owner = tl.load(index + b).to(tl.int64)
    p = tl.load(pos + b).to(tl.int32)
    r, dims, columns, n = tl.arange(0, BR), tl.arange(0, BD), tl.arange(0, BV), tl.arange(0, BN)
    heads, real = head * R + r, r < R
    ring = (owner * size) * G + head
    k_D = tl.load(k + batch * k_b + head * k_h + dims, mask=dims < D, other=0.0).to(ring_k.dtype.element_ty)
    v_V = tl.load(v + batch * v_b + head * v_h + columns, mask=columns < V, other=0.0).to(ring_v.dtype.element_ty)
    q_RD = tl.load(
        q + batch * q_b + heads[:, None] * q_h + dims[None, :], mask=real[:, None] & (dims < D)[None, :], other=0.0
    )
    unit = tl.full([], LOG2_E, dtype=ACC) * scale
    top, mass = tl.full([BR], float("-inf"), dtype=ACC), tl.zeros([BR], dtype=ACC)
    out = tl.zeros([BR, BV], dtype=ACC)
    least = tl.maximum(p - window + 1, M)
    for start in range(0, window, BN):
        rank = p - window + 1 + start + n
        seen = (rank >= least) & (rank <= p)
        place = ring + ((rank + size) % size) * G
        old = seen & (rank < p)
        k_DN = tl.load(
            ring_k + place[None, :] * D + dims[:, None], mask=(dims < D)[:, None] & old[None, :], other=0.0
        )
        v_NV = tl.load(
            ring_v + place[:, None] * V + columns[None, :], mask=old[:, None] & (columns < V)[None, :], other=0.0
        )
        k_DN = tl.where((rank == p)[None, :], k_D[:, None], k_DN).to(q_RD.dtype)
        v_NV = tl.where((rank == p)[:, None], v_V[None, :], v_NV)
        scores = tl.dot(q_RD, k_DN, input_precision=PRECISION, out_dtype=ACC) * unit
        top, mass, out = attend(tl.where(seen[None, :], scores, float("-inf")), v_NV, top, mass, out, ACC, PRECISION)
    if HAS_SINKS:
        m = tl.arange(0, BM)
        old = (m < M) & (m < p)
        key = (owner * M + m) * G + head
        k_DM = tl.load(sink_k + key[None, :] * D + dims[:, None], mask=(dims < D)[:, None] & old[None, :], other=0.0)
        v_MV = tl.load(
            sink_v + key[:, None] * V + columns[None, :], mask=old[:, None] & (columns < V)[None, :], other=0.0
        )
        k_DM = tl.where((m == p)[None, :], k_D[:, None].to(k_DM.dtype), k_DM).to(q_RD.dtype)
        v_MV = tl.where((m == p)[:, None], v_V[None, :].to(v_MV.dtype), v_MV)
        seen = (m < M) & (m <= p)
        scores = tl.dot(q_RD, k_DM, input_precision=PRECISION, out_dtype=ACC) * unit
        top, mass, out = attend(tl.where(seen[None, :], scores, float("-inf")), v_MV, top, mass, out, ACC, PRECISION)
    if HAS_LOGITS:
        for i in range(0, LOGITS):
            logit = tl.load(sink_logits + heads * LOGITS + i, mask=real, other=0.0).to(ACC) * LOG2_E
            top, mass, out = add_logit(logit, top, mass, out)
    if HAS_MIX:
        share = tl.load(mix + heads, mask=real, other=0.0).to(ACC)
        mass *= share
        out *= share[:, None]
    if HAS_FAR:
        fq += batch * fq_b + heads[:, None] * fq_h
        out, mass = read_pending(
            fq, ring_f, ring_v, out, mass, real, ring, p, window, M, G, F, V, ACC, PRECISION, BR, BV, BN, BF
        )
        out, mass = read_state(
            fq, ring_f, ring_v, s + (owner * G + head) * F * V, z + (owner * G + head) * F, out, mass, real, ring, p,
            window, M, G, F, V, ACC, PRECISION, BV, BN, BF,
        )  # fmt: skip
    out = out / tl.where(mass == 0.0, 1.0, mass)[:, None]
    o += (batch * G * R + heads[:, None]) * V + columns[None, :]
    tl.store(o, out.to(o.dtype.element_ty), mask=real[:, None] & (columns < V)[None, :])
    tl.debug_barrier()
    place = ring + (p % size) * G
    tl.store(ring_k + place * D + dims, k_D, mask=dims < D)
    tl.store(ring_v + place * V + columns, v_V, mask=columns < V)
    if HAS_FAR:
        write_feature(fk + batch * fk_b + head * fk_h, ring_f + place * F, F, BF)
    if HAS_SINKS:
        write_sink(sink_k, sink_v, k_D, v_V, owner * M * G + head, p, M, G, D, V, BD, BV)


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
    """See `linearize.ops.hybrid_step`; rings, sinks and states are updated in place and must be contiguous."""
    check_hybrid_step(q, k, v, fq, fk, pos, ring_k, ring_v, ring_f, s, z, sink_k, sink_v, index, window)
    q, k, v = (_launch.inner_contiguous(x) for x in (q, k, v))
    batch, _, heads, dim = q.shape
    kv_heads, value_dim, features = k.shape[2], v.shape[3], 0 if fk is None else fk.shape[3]
    if fq is not None and fk is not None:
        fq, fk = (_launch.inner_contiguous(x) for x in (fq, fk))
    o = q.new_empty(batch, 1, heads, value_dim)
    sinks, logits = (0 if sink_k is None else sink_k.shape[1]), (0 if sink_logits is None else sink_logits.shape[1])
    mix, sink_logits = (x if x is None else x.contiguous() for x in (mix, sink_logits))
    given = (fq, fk, pos, ring_k, ring_v, ring_f, s, z, mix, sink_k, sink_v, sink_logits, index)
    rows = (q, k, v, q if fq is None else fq, k if fk is None else fk)
    args = (
        q, k, v, *(q if x is None else x for x in given), o,
        scale, window, kv_heads, heads // kv_heads, sinks, logits,
        *(stride for x in rows for stride in (x.stride(0), x.stride(2))),
    )  # fmt: skip
    constants: dict[str, Any] = {
        "D": dim, "V": value_dim, "F": features, "HAS_FAR": fk is not None, "HAS_MIX": mix is not None,
        "HAS_SINKS": sinks > 0, "HAS_LOGITS": logits > 0, "HAS_INDEX": index is not None,
        "ACC": accumulator(q), "PRECISION": precision(q), "BR": block(heads // kv_heads, 1024),
        "BD": block(dim, 1024), "BV": block(value_dim, 1024), "BM": block(sinks, 1024),
    }  # fmt: skip
    configs = step_configs(architecture(q), q, value_dim, features, window)
    _launch.launch(hybrid_step_kernel, lambda config: (batch * kv_heads,), args, constants, configs)
    return o


def step_configs(arch: int, x: Tensor, value_dim: int, features: int, window: int) -> tuple[Config, ...]:
    if x.element_size() > 2:
        return (Config(4, 1, {"BN": 16, "BF": 16}),)
    stages = 3 if arch >= 90 else 2
    return (Config(4 if value_dim <= 128 else 8, stages, {"BN": block(window, 32), "BF": block(features, 32)}),)
