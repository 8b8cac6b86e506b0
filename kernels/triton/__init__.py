"""Triton kernels, and what runs on a GPU where there is none. Importing this package registers both.

Triton itself is imported at the first call: `import linearize` does not bring it, and works without it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from linearize.kernels import cpu
from linearize.kernels.registry import Check, Kernel, register, register_backward

OLDEST_CAPABILITY = (8, 0)
WIDEST, WIDEST_LATENT, WIDEST_HYBRID_BACKWARD = 256, 640, 128
POOLS = ("ring_k", "ring_v", "ring_f", "s", "z", "sink_k", "sink_v")
HALVES_AND_FLOAT = (torch.float16, torch.bfloat16, torch.float32)


@cache
def missing() -> str:
    """Why no Triton kernel can be used on this machine, "" where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'linearize[gpu]'"
    return ""


def later(module: str, function: str) -> Callable[..., Any]:
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


def check_one(q: torch.Tensor, *rest: Any, **keywords: Any) -> str | None:
    """Claims one token a row, whose state fits in a program's registers."""
    if q.shape[1] != 1:
        return f"T is {q.shape[1]}, not 1"
    return check_line(q, *rest)


def check_step(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any, **keywords: Any) -> str | None:
    return check_one(q, k, v)


def check_hybrid_step(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: torch.Tensor | None, **keywords: Any
) -> str | None:
    """The pools are updated in place, so they must lie as the kernel expects them."""
    pools = (*rest[3:], *(keywords.get(name) for name in POOLS))
    if not all(pool.is_contiguous() for pool in pools if isinstance(pool, torch.Tensor)):
        return "a ring, a state or a sink is not contiguous"
    return check_one(q, k, v)


def check_several(q: torch.Tensor, *rest: Any, **keywords: Any) -> str | None:
    """The rows of a state fit in a program's registers."""
    return "T is 1" if q.shape[1] == 1 else check_line(q, *rest)


def check_cache(q: torch.Tensor, cache: torch.Tensor, *rest: Any, **keywords: Any) -> str | None:
    """A program holds 16 rows of a latent's dims."""
    if q.shape[2] > WIDEST_LATENT:
        return f"{q.shape[2]} dims, at most {WIDEST_LATENT}"
    return check_device(q) or check_dtypes(q, cache, cache)


def check_backward(
    inputs: Sequence[Any], gradients: Sequence[Any], needed: Sequence[bool], keywords: dict[str, Any]
) -> str | None:
    """The gradients' kernels take what the forward ones take."""
    return check_line(*inputs[:3])


def check_hybrid_backward(
    inputs: Sequence[Any], gradients: Sequence[Any], needed: Sequence[bool], keywords: dict[str, Any]
) -> str | None:
    """A program holds rows of queries, values and both their gradients."""
    widest = max(inputs[0].shape[-1], inputs[2].shape[-1])
    if widest > WIDEST_HYBRID_BACKWARD:
        return f"head dim {widest}, at most {WIDEST_HYBRID_BACKWARD} backward"
    return check_backward(inputs, gradients, needed, keywords)


def check_device(q: torch.Tensor) -> str | None:
    capability = torch.cuda.get_device_capability(q.device) if q.is_cuda else OLDEST_CAPABILITY
    return None if capability >= OLDEST_CAPABILITY else f"compute capability {capability}, needs {OLDEST_CAPABILITY}"


def check_dtypes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any) -> str | None:
    if q.dtype not in HALVES_AND_FLOAT:
        return f"{q.dtype}: Triton kernels accumulate in float32"
    return None if q.dtype == k.dtype == v.dtype else f"q, k and v are {q.dtype}, {k.dtype} and {v.dtype}"


def _register(op: str, priority: int, check: Check, module: str, function: str) -> Kernel:
    return register(Kernel(f"triton.{function}", op, "cuda", priority, check, later(module, function), missing))


def _register_backward(op: str, module: str, check: Check = check_backward) -> Kernel:
    return register_backward(
        Kernel(f"triton.{module}", op, "cuda", 30, check, later(module, "from_autograd"), missing)
    )


GLA = _register("gla_chunk", 30, check_tokens, "gla", "gla_chunk")
GLA_ONE = _register("gla_chunk", 40, check_one, "steps", "gla_one")
GLA_STEP = _register("gla_step", 30, check_step, "steps", "gla_step")
GLA_VEC_ONE = _register("gla_vec_chunk", 40, check_one, "steps", "gla_vec_one")
GLA_VEC_STEP = _register("gla_vec_step", 30, check_step, "steps", "gla_vec_step")
DELTA_ONE = _register("delta_chunk", 40, check_one, "delta_step", "delta_one")
DELTA_STEP = _register("delta_step", 30, check_step, "delta_step", "delta_step")
HYBRID = _register("hybrid_chunk", 30, check_line, "hybrid", "hybrid_chunk")
HYBRID_STEP = _register("hybrid_step", 30, check_hybrid_step, "hybrid_step", "hybrid_step")
MLA_DECODE = _register("mla_decode", 30, check_cache, "mla", "mla_decode")
SLOTS_BLOCK = _register("slots_block", 30, check_line, "slots", "slots_block")
DELTA = _register("delta_chunk", 30, check_several, "delta", "delta_chunk")
GLA_VEC = _register("gla_vec_chunk", 30, check_several, "gla_vec", "gla_vec_chunk")

GLA_BACKWARD = _register_backward("gla_chunk", "gla_backward")
GLA_VEC_BACKWARD = _register_backward("gla_vec_chunk", "gla_vec_backward")
HYBRID_BACKWARD = _register_backward("hybrid_chunk", "hybrid_backward", check_hybrid_backward)
DELTA_BACKWARD = _register_backward("delta_chunk", "delta_backward")

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
