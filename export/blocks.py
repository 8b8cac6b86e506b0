"""Weights in fewer bits, block by block, in the layouts of MatMulNBits, GatherBlockQuantized and MatMulInteger.

Rows w [N,K], one a output column, in blocks along K; the last one is filled with zeros. A block has 64 numbers in 8
bits, where 64 divides K and K is at least 192: products are 5 to 25 % faster than with 32. In narrower ones there is
nothing to gain, and a random model of width 64 loses 1.05 % perplexity with 64. Everything else has blocks of 32.
    8 bits: q = round(w / s) + 128, s = max |w| / 127                   no zero point: 128 is the operators' default
    4 bits: q = round(w / s) + z,   s = (max w - min w) / 15, z = round(-min w / s), 0 in reach
Two 4-bit numbers a byte, the first in the low half; zero points are packed the same way along the blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

SMALL_BLOCK, LARGE_BLOCK, WIDE = 32, 64, 192


def block_size(width: int, bits: int) -> int:
    """Numbers that share a scale, in rows of `width`."""
    return LARGE_BLOCK if bits == 8 and width >= WIDE and width % LARGE_BLOCK == 0 else SMALL_BLOCK


class Blocks(NamedTuple):
    """packed uint8 [N, blocks, block bits / 8], scales float32 [N, blocks], zero points uint8 [N, ..] or None."""

    packed: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None


def quantize_rows(rows: np.ndarray, bits: int) -> Blocks:
    """float32 [N,K] in `bits` 8 or 4."""
    count, width = rows.shape
    block = block_size(width, bits)
    blocks = -(-width // block)
    filled = np.zeros((count, blocks * block), dtype=np.float32)
    filled[:, :width] = rows
    w = filled.reshape(count, blocks, block)
    if bits == 8:
        scales = _nonzero(np.abs(w).max(axis=-1) / 127)
        packed = (np.rint(w / scales[..., None]) + 128).astype(np.uint8)
        return Blocks(packed, scales, None)
    low, high = np.minimum(w.min(axis=-1), 0), np.maximum(w.max(axis=-1), 0)
    scales = _nonzero((high - low) / 15)
    zeros = np.rint(-low / scales)
    q = np.clip(np.rint(w / scales[..., None]) + zeros[..., None], 0, 15).astype(np.uint8)
    return Blocks(_pairs(q), scales, _pairs(zeros.astype(np.uint8)))


def dequantize_rows(blocks: Blocks, width: int, bits: int) -> np.ndarray:
    """What the operators make of it: float32 [N, width]."""
    count = blocks.scales.shape[0]
    q = blocks.packed if bits == 8 else _unpaired(blocks.packed)
    zeros = 128.0 if blocks.zeros is None else _unpaired(blocks.zeros)[:, : blocks.scales.shape[1], None]
    return ((q.astype(np.float32) - zeros) * blocks.scales[..., None]).reshape(count, -1)[:, :width]


def quantize_columns(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [K,N] -> (uint8 [K,N] with zero point 128, scales float32 [N])."""
    scales = _nonzero(np.abs(weight).max(axis=0) / 127)
    return (np.rint(weight / scales) + 128).astype(np.uint8), scales


def _nonzero(scales: np.ndarray) -> np.ndarray:
    return np.where(scales == 0, 1, scales).astype(np.float32)


def _pairs(q: np.ndarray) -> np.ndarray:
    """uint8 [..,n] of 4 bits -> [..,ceil(n/2)]."""
    if q.shape[-1] % 2:
        q = np.concatenate([q, np.zeros_like(q[..., :1])], axis=-1)
    return q[..., 0::2] | (q[..., 1::2] << 4)


def _unpaired(packed: np.ndarray) -> np.ndarray:
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
