"""`slots_block` on a GPU: one online softmax over the slots, the block before and the query's own block.

Letters and shapes as in `linearize.ops.slots_block`. A program takes 64 queries of one head; scores are in units of
log2, and a slot's log count is added to its scores, -inf where it is empty.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.triton import _launch
from linearize.kernels.triton._blocks import attend, finite
from linearize.kernels.triton._config import Config, accumulator, architecture, block, precision
from linearize.kernels.triton.gla import LOG2_E
from linearize.kernels.triton.mla import LN_2
from linearize.ops._library import accumulation_dtype
from linearize.ops.slots_block import check_block


@triton.jit(do_not_specialize=["T"])
def slots_block_kernel(
    q, k, v, slot_k, slot_v, slot_n, mask, o, lse,
    scale, T, H, R, COUNT, window,
    q_b, q_t, q_h, k_b, k_t, k_h, v_b, v_t, v_h, m_b,
    D: tl.constexpr, V: tl.constexpr, HAS_MASK: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """o [B,T,H,V] of some queries, one head and one block of value columns; lse by the first of these."""
    b, head = tl.program_id(2) // H, tl.program_id(2) % H
    batch, kv_head = b.to(tl.int64), head // R
    columns, dims, n = tl.program_id(0) * BV + tl.arange(0, BV), tl.arange(0, BD), tl.arange(0, BN)
    t = tl.program_id(1) * C + tl.arange(0, C)
    real = t < T
    k += batch * k_b + kv_head * k_h
    v += batch * v_b + kv_head * v_h
    q_CD = tl.load(
        q + batch * q_b + head * q_h + t[:, None].to(tl.int64) * q_t + dims[None, :],
        mask=real[:, None] & (dims < D)[None, :], other=0.0,
    )  # fmt: skip
    unit = tl.full([], LOG2_E, dtype=ACC) * scale
    top, mass = tl.full([C], float("-inf"), dtype=ACC), tl.zeros([C], dtype=ACC)
    out = tl.zeros([C, BV], dtype=ACC)
    slots = (batch * (H // R) + kv_head) * COUNT
    for start in range(0, COUNT, BN):
        c = start + n
        count = tl.load(slot_n + slots + c, mask=c < COUNT, other=0.0).to(ACC)
        taken = count > 0.0
        place = (slots + c).to(tl.int64)
        seen = (dims < D)[:, None] & taken[None, :]
        k_DN = tl.load(slot_k + place[None, :] * D + dims[:, None], mask=seen, other=0.0)
        v_NV = tl.load(
            slot_v + place[:, None] * V + columns[None, :], mask=taken[:, None] & (columns < V)[None, :], other=0.0
        )
        scores = tl.dot(q_CD.to(k_DN.dtype), k_DN, input_precision=PRECISION, out_dtype=ACC) * unit
        bias = tl.where(taken, tl.log2(tl.where(taken, count, 1.0)), float("-inf"))
        top, mass, out = attend(scores + bias[None, :], v_NV, top, mass, out, ACC, PRECISION)
    last = tl.minimum(window + tl.program_id(1) * C + C, window + T)
    for start in range(0, last, BN):
        j = start + n
        exists, line = j < last, j.to(tl.int64)
        if HAS_MASK:
            exists = exists & (tl.load(mask + batch * m_b + line, mask=j < last, other=0) != 0)
        k_DN = tl.load(k + dims[:, None] + line[None, :] * k_t, mask=(dims < D)[:, None] & exists[None, :], other=0.0)
        v_NV = tl.load(
            v + line[:, None] * v_t + columns[None, :], mask=exists[:, None] & (columns < V)[None, :], other=0.0
        )
        seen = (j[None, :] <= t[:, None] + window) & exists[None, :]
        scores = tl.dot(q_CD, k_DN, input_precision=PRECISION, out_dtype=ACC) * unit
        top, mass, out = attend(tl.where(seen, scores, float("-inf")), v_NV, top, mass, out, ACC, PRECISION)
    out = out / tl.where(mass == 0.0, 1.0, mass)[:, None]
    place = (batch * T + t) * H + head
    tl.store(
        o + place[:, None] * V + columns[None, :], out.to(o.dtype.element_ty),
        mask=real[:, None] & (columns < V)[None, :],
    )  # fmt: skip
    if tl.program_id(0) == 0:
        tl.store(lse + place, (tl.log2(mass) + finite(top)) * LN_2, mask=real)


def slots_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    mask: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """See `linearize.ops.slots_block`."""
    check_block(q, k, v, slot_k, slot_v, slot_n, mask, window)
    q, k, v = (_launch.inner_contiguous(x) for x in (q, k, v))
    slot_k, slot_v, slot_n = (x.contiguous() for x in (slot_k, slot_v, slot_n))
    given = q if mask is None else _launch.inner_contiguous(mask)
    (batch, length, heads, dim), kv_heads, value_dim = q.shape, k.shape[2], v.shape[3]
    o = q.new_empty(batch, length, heads, value_dim)
    lse = q.new_empty(batch, length, heads, dtype=accumulation_dtype(q.dtype))
    args = (
        q, k, v, slot_k, slot_v, slot_n, given, o, lse,
        scale, length, heads, heads // kv_heads, slot_n.shape[2], window,
        *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], given.stride(0),
    )  # fmt: skip
    constants: dict[str, Any] = {
        "D": dim, "V": value_dim, "HAS_MASK": mask is not None, "ACC": accumulator(q), "PRECISION": precision(q),
        "BD": block(dim, 1024),
    }  # fmt: skip

    def grid(config: Config) -> tuple[int, ...]:
        sizes = config.blocks
        return triton.cdiv(value_dim, sizes["BV"]), triton.cdiv(length, sizes["C"]), batch * heads

    configs = block_configs(architecture(q), q, slot_k, value_dim, length)
    _launch.launch(slots_block_kernel, grid, args, constants, configs)
    return o, lse


def block_configs(arch: int, q: Tensor, slot_k: Tensor, value_dim: int, length: int) -> tuple[Config, ...]:
    rows = block(length, 64)
    if q.element_size() > 2:
        return (Config(8, 1, {"C": rows, "BV": block(value_dim, 32), "BN": 16}),)
    keys = 64 if slot_k.element_size() <= 2 and arch >= 90 else 32
    return (Config(4 if value_dim <= 64 else 8, 2, {"C": rows, "BV": block(value_dim, 128), "BN": keys}),)
