"""How a Triton kernel is held against the token loop in float64: bounds, shuffled orders, memory without a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from tests.kernels.triton.shim import honest

ORDERS = (0, 1, 2)
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}
Outputs = Sequence[torch.Tensor]


@contextmanager
def nan_in_new_memory() -> Iterator[None]:
    """Within it `torch.empty` gives NaN, so that what a kernel forgets to write shows."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def interpreted(call: Callable[[], Outputs], orders: Sequence[int] = ORDERS) -> Outputs:
    """The outputs of a call in the honest interpreter; the same bits in every order of the programs."""
    results = []
    for seed in orders:
        with nan_in_new_memory(), torch.no_grad(), honest(seed):
            results.append(call())
    for again in results[1:]:
        for a, b in zip(results[0], again, strict=True):
            assert torch.equal(a.nan_to_num(nan=1e9), b.nan_to_num(nan=1e9)), "the order of the programs shows"
    return results[0]


def doubled(args: Sequence[Any]) -> list[Any]:
    return [x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in args]


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Largest difference relative to the largest value; infinite where a NaN is."""
    difference = (found.double() - expected.double()).abs()
    worst = float("inf") if difference.isnan().any() else difference.max().item() if difference.numel() else 0.0
    return worst / max(1.0, expected.abs().max().item() if expected.numel() else 1.0)


def assert_equals_truth(found: Outputs, expected: Outputs, dtype: torch.dtype) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.shape == b.shape
        assert error(a, b) < BOUND[dtype], f"off by {error(a, b):.1e}"


def rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found.double() - expected.double()).square().mean().sqrt().item()
