"""What makes Triton's interpreter honest enough to test kernels with.

On its own (3.6 to 3.9) it takes bfloat16 for the integer of its bits in arithmetic and products and cuts digits off
instead of rounding, multiplies float32 in full precision where the hardware would take tf32, runs the programs of a
grid in one order, which hides races, and reads and writes out of bounds in silence. `honest()` repairs all four.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from linearize.kernels.triton import _launch

Builder = interpreter.InterpreterBuilder
Handle = interpreter.TensorHandle
BF16 = tl.bfloat16
GUARD = 64  # elements before and behind a tensor


class GuardError(AssertionError):
    """A kernel wrote outside a tensor."""


# ---- bfloat16 and tf32 -----------------------------------------------------------------------------------------------


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 of bfloat16 bits."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """The bits of the nearest bfloat16, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FC0), rounded).astype(np.uint16)


def round_to_tf32(values: np.ndarray) -> np.ndarray:
    """The nearest numbers with 10 bits behind the leading one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0xFFF) + ((bits >> np.uint32(13)) & np.uint32(1))) & np.uint32(0xFFFFE000)).view(
        np.float32
    )
    return np.where(np.isfinite(values), rounded, values)


def is_bf16(x: Any) -> bool:
    return isinstance(x, Handle) and x.dtype.scalar == BF16


def as_float(x: Any) -> Any:
    return Handle(widen(x.data), tl.float32) if is_bf16(x) else x


def computed_in_float(method: Any) -> Any:
    """An elementwise method of the builder that meets bfloat16 as numbers and rounds what it returns."""

    def wrapped(self: Any, *args: Any) -> Any:
        if not any(map(is_bf16, args)):
            return method(self, *args)
        result = method(self, *map(as_float, args))
        compared = result.data.dtype == np.bool_
        return result if compared else Handle(narrow(result.data), BF16)

    return wrapped


def cast(method: Any) -> Any:
    def wrapped(self: Any, src: Any, dst_type: Any, *rest: Any) -> Any:
        if dst_type.scalar == BF16 and not is_bf16(src):
            return Handle(narrow(src.data.astype(np.float32)), BF16)
        if is_bf16(src):
            return src if dst_type.scalar == BF16 else self.cast_impl(as_float(src), dst_type)
        return method(self, src, dst_type, *rest)

    return wrapped


def product(method: Any) -> Any:
    def wrapped(self: Any, a: Any, b: Any, d: Any, input_precision: Any, *rest: Any) -> Any:
        if a.dtype.scalar != b.dtype.scalar:
            raise TypeError(f"a product of {a.dtype.scalar} and {b.dtype.scalar}")
        a, b = as_float(a), as_float(b)
        if a.dtype.scalar == tl.float32 and "TF32" in str(input_precision) and "x3" not in str(input_precision):
            a, b = (Handle(round_to_tf32(x.data), tl.float32) for x in (a, b))
        return method(self, a, b, d, input_precision, *rest)

    return wrapped


def no_bf16(method: Any) -> Any:
    def wrapped(self: Any, inputs: Any) -> Any:
        for x in inputs if isinstance(inputs, tuple) else (inputs,):
            if x.handle.dtype.scalar == BF16:
                raise TypeError("the interpreter reduces bfloat16 by its bits: convert to float32 first")
        return method(self, inputs)

    return wrapped


# ---- the order of programs -------------------------------------------------------------------------------------------


def shuffled(seed: int) -> tuple[Any, Any]:
    """(set_grid_dim, set_grid_idx) of a builder whose programs run in a random order."""
    order: list[int] = []
    set_dim, set_idx = Builder.set_grid_dim, Builder.set_grid_idx

    def set_grid_dim(self: Any, nx: int, ny: int, nz: int) -> None:
        set_dim(self, nx, ny, nz)
        order[:] = range(nx * ny * nz)
        random.Random(seed).shuffle(order)

    def set_grid_idx(self: Any, x: int, y: int, z: int) -> None:
        _, ny, nz = self.grid_dim
        x, rest = divmod(order[(x * ny + y) * nz + z], ny * nz)
        set_idx(self, x, *divmod(rest, nz))

    return set_grid_dim, set_grid_idx


# ---- guards ----------------------------------------------------------------------------------------------------------


def canary(dtype: torch.dtype) -> float | int | bool:
    if dtype.is_floating_point:
        return float("nan")
    return True if dtype == torch.bool else torch.iinfo(dtype).min // 2 + 12345


class Guarded:
    """A copy of a tensor, of the same strides, in the midst of canaries: NaN, or an index far out of reach."""

    def __init__(self, x: torch.Tensor) -> None:
        steps = ((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
        span = 1 + sum(steps) if x.numel() else 0
        self.source, self.storage = x, torch.full((span + 2 * GUARD,), canary(x.dtype), dtype=x.dtype)
        self.inside = self.storage.as_strided(x.shape, x.stride(), GUARD)
        self.inside.copy_(x)
        outside = torch.ones(span + 2 * GUARD, dtype=torch.bool)
        outside.as_strided(x.shape, x.stride(), GUARD).fill_(False)
        self.outside, self.expected = outside, self.storage[outside].clone()

    def release(self, name: str) -> None:
        found = self.storage[self.outside]
        if not torch.equal(found.view(torch.uint8), self.expected.view(torch.uint8)):
            raise GuardError(f"{name}: written outside a tensor of {tuple(self.source.shape)}")
        self.source.copy_(self.inside)


def guarded_run(kernel: Any, grid: Any, args: Sequence[Any], constants: dict[str, Any], config: Any) -> None:
    """`_launch.run` with every tensor between canaries; one tensor given twice stays one."""
    copies: dict[Any, Guarded] = {}
    passed = []
    for x in args:
        if isinstance(x, torch.Tensor):
            key = (x.data_ptr(), tuple(x.shape), x.stride(), x.dtype)
            passed.append(copies.setdefault(key, Guarded(x)).inside)
        else:
            passed.append(x)
    kernel[grid(config)](*passed, **_launch.options(constants, config))
    for copy in copies.values():
        copy.release(kernel.fn.__name__)


@contextmanager
def honest(seed: int = 0, parts: Sequence[str] = ("numbers", "order", "guards")) -> Iterator[None]:
    """Within it kernels compute, order and address as a GPU would; `parts` leaves some of it out."""
    with ExitStack() as stack:
        stack.enter_context(np.errstate(divide="ignore"))  # log2(0) is -inf, as it should be
        if "numbers" in parts:
            for name in ("binary_op", "ternary_op", "unary_op", "create_fma", "create_fabs"):
                stack.enter_context(patch.object(Builder, name, computed_in_float(getattr(Builder, name))))
            for name in ("cast_impl", "create_fp_to_fp"):
                stack.enter_context(patch.object(Builder, name, cast(getattr(Builder, name))))
            stack.enter_context(patch.object(Builder, "create_dot", product(Builder.create_dot)))
            for kind in (interpreter.ReduceOps, interpreter.ScanOps):
                stack.enter_context(patch.object(kind, "apply_impl", no_bf16(kind.apply_impl)))
        if "order" in parts:
            for name, method in zip(("set_grid_dim", "set_grid_idx"), shuffled(seed), strict=True):
                stack.enter_context(patch.object(Builder, name, method))
        if "guards" in parts:
            stack.enter_context(patch.object(_launch, "run", guarded_run))
        yield
