"""The backward of `hybrid_chunk` on a GPU. Letters and shapes as in `hybrid.py` beside this; o_i = N_i / M_i.

    dN_i = do_i / M_i,   dM_i = -do_i.o_i / M_i            so the weight w_ij of any key gets dw_ij = dN_i.v_j + dM_i
    window   ds_ij = c p_ij dw_ij,  p_ij = e^{s_ij - m_i};   dq_i = scale sum_j ds_ij k_j,   dk_j, dv_j likewise
    maximum  dm_i = -c a_i,  a_i = sum_j p_ij dw_ij, goes to the key that has it;   dc = sum_i a_i
    far      linear attention of fq over fk with values [v ; 1] and upstream [dN ; dM]: `gla_backward.py` without gates

m_i is part of the function where there is a far field; without one it cancels. A first kernel takes queries and finds
dq, a_i and the key of the maximum; a second takes keys and finds dk and dv. Sinks are few: PyTorch's own operators
differentiate them, in memory linear in T.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.triton import _launch
from linearize.kernels.triton._blocks import finite, weigh
from linearize.kernels.triton._config import CHUNK, Config, accumulator, architecture, block, precision
from linearize.kernels.triton.gla import LOG2_E
from linearize.kernels.triton.gla_backward import gla_backward
from linearize.kernels.triton.hybrid import forward
from linearize.kernels.triton.hybrid_sinks import Sinks
from linearize.ops._library import accumulation_dtype

BESIDE = 16  # columns that the 1 beside the values takes, so that rows stay aligned
NOWHERE = tl.constexpr(2**30)


@triton.jit(do_not_specialize=["T"])
def hybrid_query_kernel(
    q, k, v, mask, do, mix, tops, masses, dmass, extra, extra_top, dq, spread, chosen,
    scale, T, H, R, window, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, m_b, do_b, do_t, do_h,
    D: tl.constexpr, V: tl.constexpr, C: tl.constexpr, HAS_FAR: tl.constexpr, HAS_MIX: tl.constexpr,
    HAS_EXTRA: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    BN: tl.constexpr,
):  # fmt: skip
    """dq [B,T,H,D] of the window, a (`spread`) and the key of the maximum, -1 where it is a sink: [B,T,H]."""
    c, b, head = tl.program_id(0), tl.program_id(1) // H, tl.program_id(1) % H
    batch, kv_head = b.to(tl.int64), head // R
    dims, columns, t = tl.arange(0, BD), tl.arange(0, BV), c * C + tl.arange(0, C)
    at, real = t.to(tl.int64), t < T
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    q_CD = tl.load(
        q + batch * q_b + head * q_h + at[:, None] * q_t + dims[None, :],
        mask=real[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    do_CV = tl.load(
        do + batch * do_b + head * do_h + at[:, None] * do_t + columns[None, :],
        mask=real[:, None] & (columns < V)[None, :], other=0.0,
    )  # fmt: skip
    row = (batch * T + at) * H + head
    top = finite(tl.load(tops + row, mask=real, other=0.0))
    mass, dm = tl.load(masses + row, mask=real, other=1.0), tl.load(dmass + row, mask=real, other=0.0)
    inverse, unit = 1.0 / tl.where(mass == 0.0, 1.0, mass), tl.full([], LOG2_E, dtype=ACC) * scale
    total, best = tl.zeros([C], dtype=ACC), tl.full([C], float("-inf"), dtype=ACC)
    place, out = tl.full([C], -1, dtype=tl.int32), tl.zeros([C, BD], dtype=ACC)
    for start in range(0, C + window, BN):
        j = c * C + start + tl.arange(0, BN)
        line = j.to(tl.int64)
        exists = tl.load(mask + batch * m_b + line, mask=j < T + window, other=0) != 0
        k_ND = tl.load(k + line[:, None] * k_t + dims[None, :], mask=exists[:, None] & (dims < D)[None, :], other=0.0)
        v_VN = tl.load(
            v + line[None, :] * v_t + columns[:, None], mask=(columns < V)[:, None] & exists[None, :], other=0.0
        )
        seen = (j[None, :] > t[:, None]) & (j[None, :] <= t[:, None] + window) & exists[None, :]
        scores = tl.dot(q_CD, tl.trans(k_ND), input_precision=PRECISION, out_dtype=ACC) * unit
        scores = tl.where(seen, scores, float("-inf"))
        gain = tl.dot(do_CV, v_VN, input_precision=PRECISION, out_dtype=ACC) * inverse[:, None] + dm[:, None]
        gain = tl.where(seen, tl.exp2(scores - top[:, None]) * gain, 0.0)
        total += tl.sum(gain, 1)
        out = weigh(gain, k_ND, out, ACC, PRECISION)
        if HAS_FAR:
            new = tl.maximum(best, tl.max(scores, 1))
            first = tl.min(tl.where(seen & (scores == new[:, None]), j[None, :], NOWHERE), 1)
            place = tl.where(new > best, first, place)
            best = new
    if HAS_EXTRA:
        total += tl.load(extra + row, mask=real, other=0.0)
    share = tl.full([], 1.0, dtype=ACC)
    if HAS_MIX:
        share = tl.load(mix + head).to(ACC)
    out *= share
    if HAS_FAR:
        if HAS_EXTRA:
            place = tl.where(best >= tl.load(extra_top + row, mask=real, other=0.0), place, -1)
        k_CD = tl.load(
            k + place[:, None].to(tl.int64) * k_t + dims[None, :],
            mask=(real & (place >= 0))[:, None] & (dims < D)[None, :], other=0.0,
        )  # fmt: skip
        out -= (share * total)[:, None] * k_CD.to(ACC)
        tl.store(chosen + row, place, mask=real)
    tl.store(spread + row, total, mask=real)
    dq += row[:, None] * D + dims[None, :]
    tl.store(dq, (out * scale).to(dq.dtype.element_ty), mask=real[:, None] & (dims < D)[None, :])


@triton.jit(do_not_specialize=["T"])
def hybrid_key_kernel(
    q, k, v, mask, do, mix, tops, masses, dmass, spread, chosen, dk, dv,
    scale, T, H, R, window, q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, m_b, do_b, do_t, do_h,
    D: tl.constexpr, V: tl.constexpr, HAS_FAR: tl.constexpr, HAS_MIX: tl.constexpr, ACC: tl.constexpr,
    PRECISION: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr, BN: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """dk [B,w+T,G,D] and dv [B,w+T,G,V] of the window, of one block of keys and one kv head."""
    b, kv_head, heads = tl.program_id(1) // (H // R), tl.program_id(1) % (H // R), H // R
    batch, dims, columns = b.to(tl.int64), tl.arange(0, BD), tl.arange(0, BV)
    first = tl.program_id(0) * BN
    j = first + tl.arange(0, BN)
    line, size = j.to(tl.int64), T + window
    exists = tl.load(mask + batch * m_b + line, mask=j < size, other=0) != 0
    k_ND = tl.load(
        k + batch * k_b + kv_head * k_h + line[:, None] * k_t + dims[None, :],
        mask=exists[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    v_NV = tl.load(
        v + batch * v_b + kv_head * v_h + line[:, None] * v_t + columns[None, :],
        mask=exists[:, None] & (columns < V)[None, :], other=0.0,
    )  # fmt: skip
    keys, values = tl.zeros([BN, BD], dtype=ACC), tl.zeros([BN, BV], dtype=ACC)
    unit = tl.full([], LOG2_E, dtype=ACC) * scale
    for r in range(0, R):
        head = kv_head * R + r
        share = tl.full([], 1.0, dtype=ACC)
        if HAS_MIX:
            share = tl.load(mix + head).to(ACC)
        for start in range(tl.maximum(first - window, 0), tl.minimum(first + BN - 1, T), BM):
            t = start + tl.arange(0, BM)
            at, real = t.to(tl.int64), t < T
            q_MD = tl.load(
                q + batch * q_b + head * q_h + at[:, None] * q_t + dims[None, :],
                mask=real[:, None] & (dims < D)[None, :], other=0.0,
            )  # fmt: skip
            do_MV = tl.load(
                do + batch * do_b + head * do_h + at[:, None] * do_t + columns[None, :],
                mask=real[:, None] & (columns < V)[None, :], other=0.0,
            )  # fmt: skip
            row = (batch * T + at) * H + head
            top = finite(tl.load(tops + row, mask=real, other=0.0))
            mass, dm = tl.load(masses + row, mask=real, other=1.0), tl.load(dmass + row, mask=real, other=0.0)
            inverse = 1.0 / tl.where(mass == 0.0, 1.0, mass)
            seen = (j[:, None] > t[None, :]) & (j[:, None] <= t[None, :] + window) & exists[:, None] & real[None, :]
            scores = tl.dot(k_ND, tl.trans(q_MD), input_precision=PRECISION, out_dtype=ACC) * unit
            weights = share * tl.exp2(tl.where(seen, scores - top[None, :], float("-inf")))
            values = weigh(weights * inverse[None, :], do_MV, values, ACC, PRECISION)
            gain = tl.dot(v_NV, tl.trans(do_MV), input_precision=PRECISION, out_dtype=ACC) * inverse[None, :]
            gain = weights * (gain + dm[None, :])
            if HAS_FAR:
                total = tl.load(spread + row, mask=real, other=0.0)
                place = tl.load(chosen + row, mask=real, other=-1)
                gain -= tl.where(place[None, :] == j[:, None], share * total[None, :], 0.0)
            keys = weigh(gain, q_MD, keys, ACC, PRECISION)
    out = (batch * size + line) * heads + kv_head
    tl.store(
        dk + out[:, None] * D + dims[None, :], (keys * scale).to(dk.dtype.element_ty),
        mask=(j < size)[:, None] & (dims < D)[None, :],
    )  # fmt: skip
    tl.store(
        dv + out[:, None] * V + columns[None, :], values.to(dv.dtype.element_ty),
        mask=(j < size)[:, None] & (columns < V)[None, :],
    )  # fmt: skip


def from_autograd(
    inputs: Sequence[Any], gradients: Sequence[Tensor | None], needed: Sequence[bool], keywords: dict[str, Any]
) -> list[Tensor | None]:
    """`hybrid_backward` on what the operator's autograd holds; trailing inputs may be missing."""
    given = [*inputs, *(None for _ in range(13 - len(inputs)))]
    q, v, (do, ds, dz) = given[0], given[2], gradients
    if do is None:
        do = q.new_zeros(1).expand(*q.shape[:3], v.shape[3])
    call: list[Any] = [*given, do, ds, dz]
    found = hybrid_backward(*call, **keywords)
    return [x if need else None for x, need in zip(found, needed, strict=False)]


def hybrid_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    fq: Tensor | None,
    fk: Tensor | None,
    mix: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    sink_mask: Tensor | None,
    sink_logits: Tensor | None,
    s0: Tensor | None,
    z0: Tensor | None,
    do: Tensor,
    ds: Tensor | None,
    dz: Tensor | None,
    *,
    window: int,
    scale: float,
) -> list[Tensor | None]:
    """Gradients of the operator's 13 inputs, None for the masks and for what is not given."""
    sinks = (sink_k, sink_v, sink_mask, sink_logits)
    near = near_gradients(q, k, v, mask, fq, fk, mix, sinks, s0, z0, do, window=window, scale=scale)
    dv, dfq, dfk, ds0, dz0 = near.dv, None, None, None, None
    dmix = None if mix is None else torch.zeros_like(mix)  # without a far field c cancels
    if fq is not None and fk is not None:
        dfq, dfk, far_dv, ds0, dz0 = _far(fq, fk, v, mask, s0, z0, near.upstream, ds, dz)
        dv[:, : q.shape[1]] += far_dv
        dmix = None if mix is None else near.spread.sum((0, 1)).to(mix.dtype)
    by_window = [near.dq.to(q.dtype), near.dk.to(k.dtype), dv.to(v.dtype), None]
    return [*by_window, dfq, dfk, dmix, *near.by_sinks[:2], None, near.by_sinks[2], ds0, dz0]


@dataclass
class Near:
    """What window and sinks make: gradients, a (`spread`), and dN and dM for the far field."""

    dq: Tensor
    dk: Tensor
    dv: Tensor
    by_sinks: list[Tensor | None]
    spread: Tensor
    upstream: tuple[Tensor, Tensor]


def near_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    fq: Tensor | None,
    fk: Tensor | None,
    mix: Tensor | None,
    sinks: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    s0: Tensor | None,
    z0: Tensor | None,
    do: Tensor,
    *,
    window: int,
    scale: float,
) -> Near:
    """The forward again, for maxima and denominators, then the gradients of window and sinks."""
    q, k, v, mask, do = (_launch.inner_contiguous(x) for x in (q, k, v, mask, do.to(q.dtype)))
    wide = accumulation_dtype(q.dtype)
    o = q.new_empty(*q.shape[:3], v.shape[3], dtype=wide)
    tops, masses = (q.new_empty(q.shape[:3], dtype=wide) for _ in range(2))
    forward(q, k, v, mask, fq, fk, (*sinks, mix), s0, z0, o, (tops, masses), window, scale)
    inverse = 1.0 / masses.masked_fill(masses == 0, 1.0)
    dmass = (-(do * o).sum(-1) * inverse).masked_fill_(masses == 0, 0.0)
    dn, extras = do * inverse[..., None], None
    if sinks[0] is not None or sinks[3] is not None:
        extras = Sinks(q, *sinks, tops, dn, dmass, scale)
    rows = (tops, masses, dmass)
    dq, dk, dv, spread, chosen = _window(q, k, v, mask, do, mix, rows, extras, fq is not None, window, scale)
    by_sinks: list[Tensor | None] = [None, None, None]
    if extras is not None:
        more, *by_sinks = extras.gradients(mix, spread, chosen if fq is not None else None)
        dq = dq if more is None else dq + more
    return Near(dq, dk, dv, by_sinks, spread, (dn, dmass))


def _window(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, do: Tensor, mix: Tensor | None,
    rows: tuple[Tensor, Tensor, Tensor], extras: Sinks | None, has_far: bool, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk and dv of the window in the states' dtype, a and the key of the maximum [B,T,H]."""
    batch, length, heads, dim, kv_heads, value_dim = *q.shape, k.shape[2], v.shape[3]
    tops = rows[0]
    dq, dk, dv = (torch.empty(x.shape, dtype=tops.dtype, device=x.device) for x in (q, k, v))
    spread, chosen = torch.empty_like(tops), torch.empty(tops.shape, dtype=torch.int32, device=q.device)
    given_mix = q if mix is None else mix.contiguous()
    extra = (tops, tops) if extras is None else (extras.total.detach(), extras.top.detach() / math.log(2))
    sizes = (
        scale, length, heads, heads // kv_heads, window, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
        mask.stride(0), *do.stride()[:3],
    )  # fmt: skip
    constants: dict[str, Any] = {
        "D": dim, "V": value_dim, "HAS_FAR": has_far, "HAS_MIX": mix is not None, "ACC": accumulator(q),
        "PRECISION": precision(q), "BD": block(dim, 1024), "BV": block(value_dim, 1024),
    }  # fmt: skip
    args = (q, k, v, mask, do, given_mix, *rows, *(x.contiguous() for x in extra), dq, spread, chosen, *sizes)
    configs = query_configs(architecture(q), q, max(dim, value_dim))

    def by_query(config: Config) -> tuple[int, ...]:
        return triton.cdiv(length, config.blocks["C"]), batch * heads

    _launch.launch(hybrid_query_kernel, by_query, args, constants | {"HAS_EXTRA": extras is not None}, configs)
    args = (q, k, v, mask, do, given_mix, *rows, spread, chosen, dk, dv, *sizes)

    def by_key(config: Config) -> tuple[int, ...]:
        return triton.cdiv(length + window, config.blocks["BN"]), batch * kv_heads

    _launch.launch(hybrid_key_kernel, by_key, args, constants, key_configs(architecture(q), q, max(dim, value_dim)))
    return dq, dk, dv, spread, chosen


def _far(
    fq: Tensor, fk: Tensor, v: Tensor, mask: Tensor, s0: Tensor | None, z0: Tensor | None,
    dn: tuple[Tensor, Tensor], ds: Tensor | None, dz: Tensor | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Gradients of fq, fk, the leaving values [B,T,G,V], s0 and z0. dn / M overflows float16: it takes float32."""
    length, value_dim = fq.shape[1], v.shape[3]
    dtype = torch.float32 if fq.dtype == torch.float16 else fq.dtype
    exists = mask[:, :length, None, None]
    values = beside(v[:, :length].masked_fill(~exists, 0.0), torch.ones_like(v[:, :length, :, 0])).to(dtype)
    start = None if s0 is None and z0 is None else _states(s0, z0, fk, v)
    upstream = None if ds is None and dz is None else _states(ds, dz, fk, v)
    writers = fk.to(dtype).masked_fill(~exists, 0.0)
    dfq, dfk, dv, _, dstart = gla_backward(
        fq.to(dtype), writers, values, None, start, beside(*dn).to(dtype), upstream, 1.0, False
    )
    dfk, far = dfk.masked_fill(~exists, 0.0).to(fk.dtype), dv[..., :value_dim].masked_fill(~exists, 0.0)
    ds0 = None if s0 is None or dstart is None else dstart[..., :value_dim].to(s0.dtype)
    dz0 = None if z0 is None or dstart is None else dstart[..., value_dim].to(z0.dtype)
    return dfq.to(fq.dtype), dfk, far, ds0, dz0  # type: ignore[return-value]


def beside(x: Tensor, column: Tensor) -> Tensor:
    """[..,V] and [..] -> [..,V + 16]: the column behind x, zeros behind it."""
    out = x.new_zeros(*x.shape[:-1], x.shape[-1] + BESIDE)
    out[..., : x.shape[-1]] = x
    out[..., x.shape[-1]] = column
    return out


def _states(s: Tensor | None, z: Tensor | None, fk: Tensor, v: Tensor) -> Tensor:
    """[s ; z] as one state [B,G,F,V + 16], zeros for what is missing."""
    (batch, _, kv_heads, features), dtype = fk.shape, accumulation_dtype(fk.dtype)
    s = fk.new_zeros(batch, kv_heads, features, v.shape[3], dtype=dtype) if s is None else s.to(dtype)
    return beside(s, fk.new_zeros(batch, kv_heads, features, dtype=dtype) if z is None else z.to(dtype))


def query_configs(arch: int, x: Tensor, dim: int) -> tuple[Config, ...]:
    if x.element_size() > 2:
        return (Config(8, 1, {"C": 32, "BN": 16}),)
    if dim <= 64:
        return (Config(4, 1, {"C": CHUNK, "BN": 64 if arch >= 90 else 32}),)
    return (Config(8, 1, {"C": CHUNK, "BN": 32}) if arch >= 90 else Config(4, 1, {"C": 32, "BN": 32}),)


def key_configs(arch: int, x: Tensor, dim: int) -> tuple[Config, ...]:
    if x.element_size() > 2:
        return (Config(8, 1, {"BN": 32, "BM": 16}),)
    return (Config(4, 1, {"BN": 64 if dim <= 64 else 32, "BM": 32}),)
