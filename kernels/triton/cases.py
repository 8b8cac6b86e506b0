"""One call of every launcher for each head dim and dtype that it has configurations for.

The ahead-of-time gate compiles them on meta tensors; the GPU tests run them for their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from linearize.kernels.triton import (
    delta,
    delta_backward,
    delta_step,
    gla,
    gla_backward,
    gla_vec,
    gla_vec_backward,
    hybrid,
    hybrid_backward,
    hybrid_step,
    mla,
    slots,
    steps,
)

Case = Callable[[torch.device], Any]
BF16, FP32 = torch.bfloat16, torch.float32


def _gla(dtype: torch.dtype, dim: int) -> Case:
    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(2, 512, heads, dim, dtype=dtype, device=device) for heads in (4, 2, 2))
        g, s0 = torch.empty(2, 512, 2, device=device), torch.empty(2, 2, dim, dim, device=device)
        return gla.gla_chunk(q, k, v, g, s0, scale=0.1)

    return call


def _hybrid(dtype: torch.dtype, dim: int, features: int = 128) -> Case:
    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(2, n, h, dim, dtype=dtype, device=device) for n, h in ((512, 4), (576, 2), (576, 2)))
        fq, fk = (torch.empty(2, 512, heads, features, dtype=dtype, device=device) for heads in (4, 2))
        mask, mix = torch.empty(2, 576, dtype=torch.bool, device=device), torch.empty(4, device=device)
        s0, z0 = torch.empty(2, 2, features, dim, device=device), torch.empty(2, 2, features, device=device)
        return hybrid.hybrid_chunk(
            q, k, v, mask, fq, fk, mix, sink_logits=mix[:, None], s0=s0, z0=z0, window=64, scale=0.1
        )

    return call


def _gla_step(dtype: torch.dtype, dim: int) -> Case:
    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(8, 1, heads, dim, dtype=dtype, device=device) for heads in (8, 2, 2))
        g, s = torch.empty(8, 1, 2, device=device), torch.empty(16, 2, dim, dim, device=device)
        index = torch.empty(8, dtype=torch.int64, device=device)
        return steps.gla_step(q, k, v, g, s, index, scale=0.1)

    return call


def _vec_and_delta_step(dtype: torch.dtype, dim: int, name: str) -> Case:
    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(8, 1, heads, dim, dtype=dtype, device=device) for heads in (8, 2, 2))
        g, s = torch.empty(8, 1, 2, dim, device=device), torch.empty(16, 2, dim, dim, device=device)
        index = torch.empty(8, dtype=torch.int64, device=device)
        if name == "gla_vec":
            return steps.gla_vec_step(q, k, v, g, s, index, scale=0.1)
        return delta_step.delta_step(q, k, v, g[..., 0], g[..., 1], s, index, scale=0.1, l2norm=True)

    return call


def _hybrid_step(dtype: torch.dtype, dim: int, features: int = 128, window: int = 64) -> Case:
    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(8, 1, heads, dim, dtype=dtype, device=device) for heads in (8, 2, 2))
        fq, fk = (torch.empty(8, 1, heads, features, dtype=dtype, device=device) for heads in (8, 2))
        ring_k, ring_v = (torch.empty(16, 2 * window, 2, dim, dtype=dtype, device=device) for _ in range(2))
        ring_f = torch.empty(16, 2 * window, 2, features, dtype=dtype, device=device)
        s, z = torch.empty(16, 2, features, dim, device=device), torch.empty(16, 2, features, device=device)
        pos, index = (torch.empty(8, dtype=torch.int64, device=device) for _ in range(2))
        mix = torch.empty(8, device=device)
        return hybrid_step.hybrid_step(
            q, k, v, fq, fk, pos, ring_k, ring_v, ring_f, s, z, mix,
            sink_logits=mix[:, None], index=index, window=window, scale=0.1,
        )  # fmt: skip

    return call


def _mla(dtype: torch.dtype, rank: int = 512, rope: int = 64) -> Case:
    def call(device: torch.device) -> Any:
        q = torch.empty(2, 32, rank + rope, dtype=dtype, device=device)
        cache = torch.empty(2, 4096, rank + rope, dtype=dtype, device=device)
        return mla.mla_decode(q, cache, torch.empty(2, dtype=torch.int64, device=device), rank=rank, scale=0.1)

    return call


def _slots(dtype: torch.dtype, dim: int, window: int = 64, count: int = 64) -> Case:
    def call(device: torch.device) -> Any:
        q = torch.empty(2, window, 4, dim, dtype=dtype, device=device)
        k, v = (torch.empty(2, 2 * window, 2, dim, dtype=dtype, device=device) for _ in range(2))
        slot_k, slot_v = (torch.empty(2, 2, count, dim, device=device) for _ in range(2))
        n = torch.empty(2, 2, count, device=device)
        return slots.slots_block(q, k, v, slot_k, slot_v, n, window=window, scale=0.1)

    return call


def _gla_backward(dtype: torch.dtype, dim: int) -> Case:
    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(2, 512, heads, dim, dtype=dtype, device=device) for heads in (4, 2, 2))
        g, s0 = torch.empty(2, 512, 2, device=device), torch.empty(2, 2, dim, dim, device=device)
        return gla_backward.gla_backward(q, k, v, g, s0, torch.empty_like(q), s0, 0.1)

    return call


def _delta(dtype: torch.dtype, dim: int) -> Case:
    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(2, 512, heads, dim, dtype=dtype, device=device) for heads in (4, 2, 2))
        beta, g = (torch.empty(2, 512, 2, device=device) for _ in range(2))
        return delta.delta_chunk(q, k, v, beta, g, torch.empty(2, 2, dim, dim, device=device), scale=0.1)

    return call


def _delta_backward(dtype: torch.dtype, dim: int) -> Case:
    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(2, 512, heads, dim, dtype=dtype, device=device) for heads in (4, 2, 2))
        beta, g = (torch.empty(2, 512, 2, device=device) for _ in range(2))
        s0 = torch.empty(2, 2, dim, dim, device=device)
        return delta_backward.delta_backward(q, k, v, beta, g, s0, torch.empty_like(q), s0, 0.1, True)

    return call


def _gla_vec(dtype: torch.dtype, dim: int) -> Case:
    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(2, 512, heads, dim, dtype=dtype, device=device) for heads in (4, 2, 2))
        g, s0 = torch.empty(2, 512, 2, dim, device=device), torch.empty(2, 2, dim, dim, device=device)
        return gla_vec.gla_vec_chunk(q, k, v, g, s0, scale=0.1)

    return call


def _gla_vec_backward(dtype: torch.dtype, dim: int) -> Case:
    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(2, 512, heads, dim, dtype=dtype, device=device) for heads in (4, 2, 2))
        g, s0 = torch.empty(2, 512, 2, dim, device=device), torch.empty(2, 2, dim, dim, device=device)
        return gla_vec_backward.gla_vec_backward(q, k, v, g, s0, torch.empty_like(q), s0, 0.1)

    return call


def _hybrid_backward(dtype: torch.dtype, dim: int, features: int = 128, far: bool = False) -> Case:
    """The far field's part is `gla_backward` on other dims: once is enough."""

    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(2, n, h, dim, dtype=dtype, device=device) for n, h in ((512, 4), (576, 2), (576, 2)))
        fq, fk = (torch.empty(2, 512, heads, features, dtype=dtype, device=device) for heads in (4, 2))
        mask, mix = torch.empty(2, 576, dtype=torch.bool, device=device), torch.empty(4, device=device)
        s0, z0 = torch.empty(2, 2, features, dim, device=device), torch.empty(2, 2, features, device=device)
        sinks, tokens = (None, None, None, mix[:, None]), (q, k, v, mask, fq, fk, mix)
        if far:
            given = (*tokens, *sinks, s0, z0, torch.empty_like(q), s0, z0)
            return hybrid_backward.hybrid_backward(*given, window=64, scale=0.1)
        return hybrid_backward.near_gradients(*tokens, sinks, s0, z0, torch.empty_like(q), window=64, scale=0.1)

    return call


CASES: dict[str, Case] = {
    "gla bf16 d64": _gla(BF16, 64),
    "gla bf16 d128": _gla(BF16, 128),
    "gla fp32 d64": _gla(FP32, 64),
    "gla_backward bf16 d64": _gla_backward(BF16, 64),
    "gla_backward bf16 d128": _gla_backward(BF16, 128),
    "gla_backward fp32 d64": _gla_backward(FP32, 64),
    "delta bf16 d64": _delta(BF16, 64),
    "delta bf16 d128": _delta(BF16, 128),
    "delta fp32 d64": _delta(FP32, 64),
    "delta_backward bf16 d128": _delta_backward(BF16, 128),
    "delta_backward fp32 d64": _delta_backward(FP32, 64),
    "gla_vec bf16 d64": _gla_vec(BF16, 64),
    "gla_vec bf16 d128": _gla_vec(BF16, 128),
    "gla_vec fp32 d64": _gla_vec(FP32, 64),
    "gla_vec_backward bf16 d128": _gla_vec_backward(BF16, 128),
    "gla_vec_backward fp32 d64": _gla_vec_backward(FP32, 64),
    "hybrid bf16 d64": _hybrid(BF16, 64),
    "hybrid bf16 d128": _hybrid(BF16, 128),
    "hybrid fp32 d64": _hybrid(FP32, 64),
    "hybrid_backward bf16 d64": _hybrid_backward(BF16, 64),
    "hybrid_backward bf16 d128": _hybrid_backward(BF16, 128, far=True),
    "hybrid_backward fp32 d64": _hybrid_backward(FP32, 64),
    "hybrid bf16 d256": _hybrid(BF16, 256),
    "gla_step bf16 d128": _gla_step(BF16, 128),
    "gla_vec_step bf16 d128": _vec_and_delta_step(BF16, 128, "gla_vec"),
    "delta_step bf16 d128": _vec_and_delta_step(BF16, 128, "delta"),
    "delta_step fp32 d64": _vec_and_delta_step(FP32, 64, "delta"),
    "hybrid_step bf16 d64": _hybrid_step(BF16, 64),
    "hybrid_step bf16 d128": _hybrid_step(BF16, 128),
    "hybrid_step fp32 d64": _hybrid_step(FP32, 64),
    "mla_decode bf16 512+64": _mla(BF16),
    "mla_decode fp32 256+32": _mla(FP32, 256, 32),
    "slots_block bf16 d64": _slots(BF16, 64),
    "slots_block bf16 d128": _slots(BF16, 128),
    "slots_block fp32 d64": _slots(FP32, 64),
}
