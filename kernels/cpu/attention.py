"""`attention` on CPU: PyTorch's fused SDPA where it computes the same function, else blocks of queries."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from linearize.kernels.registry import Kernel, always, register
from linearize.ops.attention import (
    attend,
    check_attention,
    lay_out,
    mask_scores,
    query_pieces,
    slice_bias,
    visible_keys,
)

SDPA_MASK_LIMIT = 1 << 20
BLOCK_ROWS = 128


def sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
) -> Tensor:
    """One call of `F.scaled_dot_product_attention`; a mask is built only where a flag cannot say it."""
    check_attention(q, k, v, sinks)
    length, keys, kv_heads = q.shape[2], k.shape[2], k.shape[1]
    causal = causal and length > 1
    seen = None
    if window > 0 or (causal and (bias is not None or length != keys)):
        seen = visible_keys(length, keys, keys - length, causal, window, q.device)
        causal = False
    mask = _mask(q, bias, seen)
    if length == 1 and q.shape[1] > kv_heads and mask is None:
        rows = q.reshape(q.shape[0], kv_heads, -1, q.shape[3])
        return F.scaled_dot_product_attention(rows, k, v, scale=scale).reshape(*q.shape[:3], v.shape[3])
    gqa = q.shape[1] != kv_heads
    o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale, enable_gqa=gqa)
    return lay_out(o, q.dtype)  # a copy only where SDPA did not take its fused path


def blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
) -> Tensor:
    """`BLOCK_ROWS` queries at a time over the keys in their reach."""
    check_attention(q, k, v, sinks)
    batch, heads, length, _ = q.shape
    o = q.new_empty(batch, length, heads, v.shape[3]).transpose(1, 2)
    for start, stop, low, high, seen in query_pieces(length, k.shape[2], causal, window, q.device, BLOCK_ROWS):
        args = q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high], slice_bias(bias, start, stop, low, high)
        if declines_sdpa(*args, sinks, softcap=softcap) is None:
            o[:, :, start:stop] = _masked_sdpa(*args, seen, scale)
        else:
            o[:, :, start:stop] = attend(*args, seen, sinks, scale, softcap)
    return o


def _masked_sdpa(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, seen: Tensor | None, scale: float) -> Tensor:
    mask, gqa = _mask(q, bias, seen), q.shape[1] != k.shape[1]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=gqa)


def _mask(q: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor | None:
    """The bias and the reach as one SDPA mask of four dims: bool where it can be, else a float."""
    if bias is None:
        return seen
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    if bias.dtype == torch.bool:
        return bias if seen is None else bias & seen
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32
    return mask_scores(torch.zeros((), dtype=dtype, device=q.device), bias, seen)


def declines_sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
    **kwargs: object,
) -> str | None:
    """Why SDPA's fused kernel cannot compute this call, or None."""
    if softcap > 0:
        return "SDPA has no soft-cap"
    if sinks is not None:
        return "SDPA has no sink logits"
    if q.shape[3] != v.shape[3]:
        return f"SDPA is not fused for head dims {q.shape[3]} and {v.shape[3]}"
    length, keys = q.shape[2], k.shape[2]
    needs_mask = window > 0 or (causal and 1 < length != keys)
    if needs_mask and length * keys > SDPA_MASK_LIMIT:
        return f"a mask of {length} x {keys} is larger than {SDPA_MASK_LIMIT}"
    return None


SDPA = register(Kernel("cpu.sdpa", "attention", "cpu", 20, declines_sdpa, sdpa))
BLOCKS = register(Kernel("cpu.attention_blocks", "attention", "cpu", 10, always, blocks))
