"""The one place where kernels are launched, so that tests can put guards around every tensor and the ahead-of-time gate
can compile every configuration instead."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
import triton

from linearize.kernels.triton._config import Config

# The default of Triton changes in 3.10, and with it the rounding.
PINNED = {"enable_fp_fusion": True}
Grid = Callable[[Config], tuple[int, ...]]

_FASTEST: dict[Any, Config] = {}


def launch(kernel: Any, grid: Grid, args: Sequence[Any], constants: dict[str, Any], configs: Sequence[Config]) -> None:
    """Run `kernel` with the first of `configs`, or with the fastest where LINEARIZE_AUTOTUNE=1.

    A kernel that updates its arguments in place must come with one configuration: tuning runs it many times.
    """
    config = configs[0]
    if len(configs) > 1 and args[0].is_cuda and os.environ.get("LINEARIZE_AUTOTUNE") == "1":
        config = _fastest(kernel, grid, args, constants, configs)
    run(kernel, grid, args, constants, config)


def run(kernel: Any, grid: Grid, args: Sequence[Any], constants: dict[str, Any], config: Config) -> None:
    """Run `kernel` with this configuration, on the device of its first argument."""
    with torch.cuda.device(args[0].device) if args[0].is_cuda else nullcontext():
        kernel[grid(config)](*args, **options(constants, config))


def options(constants: dict[str, Any], config: Config) -> dict[str, Any]:
    """The keywords of a kernel's call: constants, block sizes and the compiler's options."""
    return {**constants, **config.blocks, "num_warps": config.warps, "num_stages": config.stages, **PINNED}


def _fastest(
    kernel: Any, grid: Grid, args: Sequence[Any], constants: dict[str, Any], configs: Sequence[Config]
) -> Config:
    sizes = tuple(tuple(x.shape) if isinstance(x, torch.Tensor) else x for x in args)
    key = (kernel.fn.__name__, args[0].device, args[0].dtype, sizes, tuple(sorted(map(str, constants.items()))))
    if key not in _FASTEST:
        times = [triton.testing.do_bench(lambda c=c: run(kernel, grid, args, constants, c)) for c in configs]
        _FASTEST[key] = configs[times.index(min(times))]
    return _FASTEST[key]


def inner_contiguous(x: torch.Tensor) -> torch.Tensor:
    """x, or a copy whose last dim has stride 1."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
