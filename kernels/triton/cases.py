"""One call of every launcher for each head dim and dtype that it has configurations for.

The ahead-of-time gate compiles them on meta tensors; the GPU tests run them for their values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from linearize.kernels.triton import gla, hybrid

Case = Callable[[torch.device], Any]
BF16, FP32 = torch.bfloat16, torch.float32


def _gla(dtype: torch.dtype, dim: int) -> Case:
    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(2, 512, heads, dim, dtype=dtype, device=device) for heads in (4, 2, 2))
        g, s0 = torch.empty(2, 512, 2, device=device), torch.empty(2, 2, dim, dim, device=device)
        return gla.forward(q, k, v, g, s0, scale=0.1)

    return call


def _hybrid(dtype: torch.dtype, dim: int, features: int = 128) -> Case:
    def call(device: torch.device) -> Any:
        q, k, v = (torch.empty(2, n, h, dim, dtype=dtype, device=device) for n, h in ((512, 4), (576, 2), (576, 2)))
        fq, fk = (torch.empty(2, 512, heads, features, dtype=dtype, device=device) for heads in (4, 2))
        mask, mix = torch.empty(2, 576, dtype=torch.bool, device=device), torch.empty(4, device=device)
        s0, z0 = torch.empty(2, 2, features, dim, device=device), torch.empty(2, 2, features, device=device)
        far = (fq, fk, mix) if features else (None, None, mix)
        state = {"s0": s0, "z0": z0} if features else {}
        return hybrid.forward(q, k, v, mask, *far, sink_logits=mix[:, None], **state, window=64, scale=0.1)

    return call


CASES: dict[str, Case] = {
    "gla bf16 d64": _gla(BF16, 64),
    "gla bf16 d128": _gla(BF16, 128),
    "gla fp32 d64": _gla(FP32, 64),
    "hybrid bf16 d64": _hybrid(BF16, 64),
    "hybrid bf16 d128": _hybrid(BF16, 128),
    "hybrid fp32 d64": _hybrid(FP32, 64),
    "hybrid bf16 d256": _hybrid(BF16, 256),
}
