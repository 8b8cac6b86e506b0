"""Triton kernels, and what runs on a GPU where there is none. Importing this package registers both.

Triton itself is imported at the first call: `import linearize` does not bring it, and works without it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from linearize.kernels import cpu
from linearize.kernels.registry import Kernel, register

OLDEST_CAPABILITY = (8, 0)
WIDEST = 256
HALVES_AND_FLOAT = (torch.float16, torch.bfloat16, torch.float32)


def missing() -> str:
    """Why no Triton kernel can be used on this machine, "" where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'linearize[gpu]'"
    return ""


def later(module: str, function: str = "forward") -> Callable[..., Any]:
    """The function of a module of this package, imported when it is first called."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(importlib.import_module(f"linearize.kernels.triton.{module}"), function)(*args, **kwargs)

    return call


def check_tokens(q: torch.Tensor, *rest: Any, **keywords: Any) -> str | None:
    """Claims q [B,T,..] on an Ampere or newer GPU, in a dtype that its matrix units take."""
    if q.shape[1] == 0:
        return "T is 0"
    return check_device(q) or check_dtypes(q, *rest)


def check_line(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **keywords: Any) -> str | None:
    """As `check_tokens`, for kernels that hold whole rows of queries."""
    if q.shape[-1] > WIDEST:
        return f"head dim {q.shape[-1]}, at most {WIDEST}"
    return check_tokens(q, k, v)


def check_device(q: torch.Tensor) -> str | None:
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else OLDEST_CAPABILITY
    return None if capability >= OLDEST_CAPABILITY else f"compute capability {capability}, needs {OLDEST_CAPABILITY}"


def check_dtypes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> str | None:
    if q.dtype not in HALVES_AND_FLOAT:
        return f"{q.dtype}: Triton kernels accumulate in float32"
    return None if q.dtype == k.dtype == v.dtype else f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"


GLA = register(Kernel("triton.gla_chunk", "gla_chunk", "cuda", 30, check_tokens, later("gla"), missing()))
HYBRID = register(Kernel("triton.hybrid_chunk", "hybrid_chunk", "cuda", 30, check_line, later("hybrid"), missing()))

# The streamed forms for the CPU are plain PyTorch, so they run on a GPU as they are, with memory linear in T.
PLAIN = (
    cpu.SDPA,
    cpu.BLOCKS,
    cpu.GLA_STEP,
    cpu.GLA_STREAM,
    cpu.GLA_VEC_STEP,
    cpu.GLA_VEC_STREAM,
    cpu.DELTA_STEP,
    cpu.DELTA_STREAM,
    cpu.HYBRID_STEP,
    cpu.HYBRID_STREAM,
)
for _kernel in PLAIN:
    register(replace(_kernel, name=_kernel.name.replace("cpu.", "torch."), device="cuda"))
