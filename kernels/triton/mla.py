"""`mla_decode` on a GPU: split-KV. The cache is read by several programs a row, whose parts are then joined.

    part i of row b:   o_i = softmax over its tokens,  lse_i = log2 of its denominator
    o = sum_i e^{lse_i - lse} o_i,   lse = log sum_i e^{lse_i}

Letters and shapes as in `linearize.ops.mla_decode`. A program serves 16 heads, so that a latent is read H / 16 times,
and as the value too. The length of a part is settled on the device from `lens`: the launch can stand in a CUDA graph.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from linearize.kernels.triton import _launch
from linearize.kernels.triton._blocks import attend, finite
from linearize.kernels.triton._config import Config, accumulator, architecture, block, precision
from linearize.kernels.triton.gla import LOG2_E
from linearize.ops._library import accumulation_dtype
from linearize.ops.mla_decode import check_mla

LN_2 = tl.constexpr(0.6931471805599453)
HEADS = 16  # the fewest rows of a matrix instruction
SPLIT = 256  # tokens below which a part does not pay
MOST_SPLITS = 64
WAVES = 2


@triton.jit(do_not_specialize=["L", "SPLITS"])
def mla_part_kernel(
    q, cache, lens, parts, masses,
    scale, L, H, SPLITS, q_b, q_h, c_b, c_t,
    RANK: tl.constexpr, ROPE: tl.constexpr, HAS_LENS: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, BH: tl.constexpr, BR: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """parts [B,SPLITS,H,R], masses [B,SPLITS,H] (log2) of one row, 16 heads and one part of the cache."""
    split, b = tl.program_id(0), tl.program_id(2)
    heads, latent, rope = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, BR), tl.arange(0, BP)
    batch, real = b.to(tl.int64), heads < H
    length = L
    if HAS_LENS:
        length = tl.minimum(tl.load(lens + b).to(tl.int32), L)
    share = tl.cdiv(tl.cdiv(length, SPLITS), BN) * BN
    first, last = split * share, tl.minimum((split + 1) * share, length)
    q += batch * q_b + heads[:, None] * q_h
    cache += batch * c_b
    q_HR = tl.load(q + latent[None, :], mask=real[:, None] & (latent < RANK)[None, :], other=0.0)
    unit = tl.full([], LOG2_E, dtype=ACC) * scale
    top, mass = tl.full([BH], float("-inf"), dtype=ACC), tl.zeros([BH], dtype=ACC)
    out = tl.zeros([BH, BR], dtype=ACC)
    for start in range(first, last, BN):
        j = start + tl.arange(0, BN)
        seen, line = j < last, j.to(tl.int64) * c_t
        c_NR = tl.load(
            cache + line[:, None] + latent[None, :], mask=seen[:, None] & (latent < RANK)[None, :], other=0.0
        )
        scores = tl.dot(q_HR, tl.trans(c_NR), input_precision=PRECISION, out_dtype=ACC)
        if ROPE > 0:
            q_HP = tl.load(q + RANK + rope[None, :], mask=real[:, None] & (rope < ROPE)[None, :], other=0.0)
            c_PN = tl.load(
                cache + line[None, :] + RANK + rope[:, None], mask=(rope < ROPE)[:, None] & seen[None, :], other=0.0
            )
            scores = tl.dot(q_HP, c_PN, acc=scores, input_precision=PRECISION, out_dtype=ACC)
        scores = tl.where(seen[None, :], scores * unit, float("-inf"))
        top, mass, out = attend(scores, c_NR, top, mass, out, ACC, PRECISION)
    out = out / tl.where(mass == 0.0, 1.0, mass)[:, None]
    place = (batch * SPLITS + split) * H + heads
    tl.store(parts + place[:, None] * RANK + latent[None, :], out, mask=real[:, None] & (latent < RANK)[None, :])
    tl.store(masses + place, tl.log2(mass) + finite(top), mask=real)


@triton.jit(do_not_specialize=["SPLITS"])
def mla_join_kernel(
    parts, masses, o, lse, H, SPLITS, RANK: tl.constexpr, ACC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """o [B,H,R] and lse [B,H] of one row and head."""
    b, head, latent = tl.program_id(1).to(tl.int64), tl.program_id(0), tl.arange(0, BR)
    top, mass, out = tl.full([], float("-inf"), dtype=ACC), tl.zeros([], dtype=ACC), tl.zeros([BR], dtype=ACC)
    for split in range(0, SPLITS):
        place = (b * SPLITS + split) * H + head
        part = tl.load(masses + place)
        new = tl.maximum(top, part)
        shrink, weight = tl.exp2(top - finite(new)), tl.exp2(part - finite(new))
        x = tl.load(parts + place * RANK + latent, mask=latent < RANK, other=0.0)
        out, mass, top = out * shrink + weight * x, mass * shrink + weight, new
    out = out / tl.where(mass == 0.0, 1.0, mass)
    place = b * H + head
    tl.store(o + place * RANK + latent, out.to(o.dtype.element_ty), mask=latent < RANK)
    tl.store(lse + place, (tl.log2(mass) + finite(top)) * LN_2)


def mla_decode(
    q: Tensor, cache: Tensor, lens: Tensor | None = None, *, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """See `linearize.ops.mla_decode`."""
    check_mla(q, cache, lens, rank)
    q, cache = (_launch.inner_contiguous(x) for x in (q, cache))
    (batch, heads, dim), length, wide = q.shape, cache.shape[1], accumulation_dtype(q.dtype)
    splits = split_count(q, batch * triton.cdiv(heads, HEADS), length)
    parts = q.new_empty(batch, splits, heads, rank, dtype=wide)
    masses = q.new_empty(batch, splits, heads, dtype=wide)
    o, lse = q.new_empty(batch, heads, rank), q.new_empty(batch, heads, dtype=wide)
    args = (
        q, cache, q if lens is None else lens, parts, masses, scale, length, heads, splits,
        *q.stride()[:2], *cache.stride()[:2],
    )  # fmt: skip
    sizes: dict[str, Any] = {"RANK": rank, "ACC": accumulator(q), "BR": block(rank, 4096)}
    constants = sizes | {
        "ROPE": dim - rank, "HAS_LENS": lens is not None, "PRECISION": precision(q), "BH": HEADS,
        "BP": block(dim - rank, 4096),
    }  # fmt: skip

    def grid(config: Config) -> tuple[int, ...]:
        return splits, triton.cdiv(heads, HEADS), batch

    _launch.launch(mla_part_kernel, grid, args, constants, part_configs(architecture(q), q, rank))
    joined = (parts, masses, o, lse, heads, splits)
    _launch.launch(mla_join_kernel, lambda config: (heads, batch), joined, sizes, (Config(4, 1),))
    return o, lse


def split_count(q: Tensor, programs: int, length: int) -> int:
    """So many parts that all multiprocessors have work, of at least `SPLIT` tokens; by the cache's size, not by `lens`,
    which only the device knows."""
    units = torch.cuda.get_device_properties(q.device).multi_processor_count if q.is_cuda else 132
    wanted = triton.cdiv(WAVES * units, max(1, programs))
    return max(1, min(wanted, triton.cdiv(length, SPLIT), MOST_SPLITS))


def part_configs(arch: int, x: Tensor, rank: int) -> tuple[Config, ...]:
    if x.element_size() > 2:
        return (Config(8, 1, {"BN": 16}),)
    return (Config(8 if rank > 256 else 4, 2, {"BN": 64 if arch >= 90 else 32}),)
