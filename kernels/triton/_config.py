"""Block sizes, warps and pipeline stages: a static table by architecture and head dim.

The first configuration of a row is used; the others are tried where LINEARIZE_AUTOTUNE=1, on a real GPU only. Every one
of them is compiled ahead of time for sm_80 and sm_90 by `tools/kernel_figures.py`, which refuses spills and too much
shared memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import triton
import triton.language as tl

CHUNK = 64  # tokens a chunk: rows of one Hopper matrix instruction
SMALLEST_DOT = 16


@dataclass(frozen=True)
class Config:
    """Sizes of a kernel's blocks (its constexpr names), warps of 32 threads a program, stages of the load pipeline."""

    warps: int
    stages: int
    blocks: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        sizes = " ".join(f"{name}={size}" for name, size in self.blocks.items())
        return f"{sizes} warps={self.warps} stages={self.stages}".strip()


Row = Callable[[int, int], tuple[Config, ...]]


def block(dim: int, most: int) -> int:
    """The power of 2 that holds `dim`, between the least that a matrix product takes and `most`."""
    return max(SMALLEST_DOT, min(most, triton.next_power_of_2(dim)))


def architecture(x: torch.Tensor) -> int:
    """90 for compute capability 9.0. What is no CUDA tensor (interpreter, ahead-of-time) stands for 9.0."""
    if not x.is_cuda:
        return ASSUMED[0]
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


ASSUMED = [90]  # `tools/kernel_figures.py` sets it while it compiles for another target


def accumulator(x: torch.Tensor) -> tl.dtype:
    """float64 for float64 inputs (the interpreter's checks), float32 for everything else."""
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def precision(x: torch.Tensor) -> str:
    """How products of float32 operands round: as `torch.backends.cuda.matmul.allow_tf32` says; float16 reads states
    of float32 in tf32, which has as many digits as float16."""
    if x.dtype == torch.float32:
        return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "ieee"
    return "ieee" if x.dtype == torch.float64 else "tf32"


def state_dtype(x: torch.Tensor) -> torch.dtype:
    """In which dtype a pass hands states to the next: bfloat16 as it is, float16 would overflow."""
    if x.dtype == torch.bfloat16:
        return torch.bfloat16
    return torch.float64 if x.dtype == torch.float64 else torch.float32
