"""flash-linear-attention as an optional backend on a GPU (`pip install 'linearize[fla]'`). Importing this registers it.

It is asked after the Triton kernels of this project and before plain PyTorch, so it serves what they lack: the delta
rule and gates by channel, forward. Gradients are still recomputed by the operators' own streamed form: kernels run
below autograd. Declined, with the reason that `linearize doctor` and `registry.recording` show:

- no GPU, or a CPU tensor: the package imports there, but none of its operators runs;
- Hopper with Triton 3.4 to 3.7.0: gated kernels are miscompiled (flash-linear-attention #640, #826, #984);
- float32, which it multiplies in TF32 (delta refuses it), float64, and head dims above 256;
- query heads that share a kv head: it has one head count, so keys and states would be repeated;
- few tokens: its launches cost more than the work.

The argument mapping is tested with a stand-in for the package; no GPU has run it yet.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from functools import cache
from typing import Any

import torch
from torch import Tensor

from linearize.kernels.registry import Kernel, register

FEWEST_TOKENS = 64
WIDEST = 256
HOPPER = (9, 0)
MISCOMPILED = ((3, 4, 0), (3, 7, 0))


@cache
def missing() -> str:
    """Why no call can go to flash-linear-attention on this machine, "" where some can."""
    if importlib.util.find_spec("fla") is None:
        return "flash-linear-attention is not installed: pip install 'linearize[fla]'"
    return "" if torch.cuda.is_available() else "torch finds no GPU, and flash-linear-attention runs on nothing else"


def wrong_here(gated: bool, capability: tuple[int, int], triton: tuple[int, ...]) -> str | None:
    """Why results on such a GPU with such a Triton cannot be trusted, or None."""
    if gated and capability[0] == HOPPER[0] and MISCOMPILED[0] <= triton <= MISCOMPILED[1]:
        version = ".".join(map(str, triton))
        return f"Triton {version} miscompiles gated kernels on Hopper; 3.7.1 and newer do not"
    return None


def declines(gated: bool, q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why a call cannot go to flash-linear-attention, or None."""
    if not q.is_cuda:
        return f"q is on {q.device.type}"
    if q.dtype not in (torch.float16, torch.bfloat16):
        return f"{q.dtype}: it multiplies float32 in TF32" if q.dtype == torch.float32 else f"{q.dtype}"
    if q.shape[2] != k.shape[2]:
        return f"{q.shape[2]} query heads share {k.shape[2]} kv heads"
    if max(q.shape[3], v.shape[3]) > WIDEST:
        return f"head dim {max(q.shape[3], v.shape[3])}, at most {WIDEST}"
    if q.shape[1] < FEWEST_TOKENS:
        return f"T is {q.shape[1]}, fewer than {FEWEST_TOKENS}"
    return wrong_here(gated, torch.cuda.get_device_capability(q.device), triton_version())


@cache
def triton_version() -> tuple[int, ...]:
    try:
        text = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return ()
    numbers = (part for part in text.split("+")[0].split(".")[:3])
    return tuple(int("".join(c for c in part if c.isdigit()) or 0) for part in numbers)


def check_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, *rest: Any, **keywords: Any) -> str | None:
    return declines(g is not None, q, k, v)


def check_delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, *rest: Any, **keywords: Any
) -> str | None:
    return declines(g is not None, q, k, v)


def call(module: str, function: str, *args: Any, s0: Tensor | None, **keywords: Any) -> tuple[Tensor, Tensor]:
    """A public function of the package with its names for scale and state; (o, float32 state)."""
    run = getattr(importlib.import_module(f"fla.ops.{module}"), function)
    o, state = run(*args, initial_state=s0, output_final_state=True, **keywords)
    return o.contiguous(), state.float().contiguous()


def gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, s0: Tensor | None = None, *, scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`gla_chunk` by `chunk_simple_gla`; the chunk's size is the package's."""
    return call("simple_gla", "chunk_simple_gla", q, k, v, g=g, scale=scale, s0=s0)


def gla_vec(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s0: Tensor | None = None, *, scale: float = 1.0, chunk: int = 64
) -> tuple[Tensor, Tensor]:
    """`gla_vec_chunk` by `chunk_gla`."""
    return call("gla", "chunk_gla", q, k, v, g=g, scale=scale, s0=s0)


def delta(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, s0: Tensor | None = None, *,
    scale: float = 1.0, chunk: int = 32, l2norm: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`delta_chunk` by `chunk_gated_delta_rule`, or `chunk_delta_rule` without gates."""
    keywords: dict[str, Any] = {"beta": beta, "scale": scale, "use_qk_l2norm_in_kernel": l2norm, "s0": s0}
    if g is None:
        return call("delta_rule", "chunk_delta_rule", q, k, v, **keywords | {"beta": beta.to(q.dtype)})
    return call("gated_delta_rule", "chunk_gated_delta_rule", q, k, v, g=g, **keywords)


GLA = register(Kernel("fla.chunk_simple_gla", "gla_chunk", "cuda", 25, check_gla, gla, missing))
GLA_VEC = register(Kernel("fla.chunk_gla", "gla_vec_chunk", "cuda", 25, check_gla, gla_vec, missing))
DELTA = register(Kernel("fla.chunk_delta_rule", "delta_chunk", "cuda", 25, check_delta, delta, missing))
