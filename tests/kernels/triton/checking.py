"""How a Triton kernel is held against the token loop in float64: bounds, shuffled orders, memory without a value."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from hypothesis import HealthCheck, Phase

from tests.kernels.triton.shim import honest

ORDERS = (0, 1, 2)
BOUND = {torch.float64: 1e-12, torch.float32: 1e-5}
Outputs = Sequence[torch.Tensor]
# Random calls in the interpreter take a second each: to make a failing one smaller would take hours.
PHASES = (Phase.explicit, Phase.reuse, Phase.generate)
SLOW: dict[str, Any] = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "phases": PHASES}


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


def error(found: torch.Tensor, expected: torch.Tensor, least: float = 1.0) -> float:
    """Largest difference relative to the largest value, or to `least` if that is larger; infinite where a NaN is."""
    difference = (found.double() - expected.double()).abs()
    worst = float("inf") if difference.isnan().any() else difference.max().item() if difference.numel() else 0.0
    return worst / max(least, expected.abs().max().item() if expected.numel() else 1.0)


def assert_equals_truth(found: Outputs, expected: Outputs, dtype: torch.dtype, gates: float = 1.0) -> None:
    """`gates`: how large the sums are of which gradients of gates and weights [B,T,Hs] are the difference."""
    for n, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.shape == b.shape
        least = gates if a.ndim == 3 else 1.0
        assert error(a, b, least) < BOUND[dtype], f"output {n} is off by {error(a, b, least):.1e}"


def terms_of_gates(*pairs: tuple[torch.Tensor, torch.Tensor]) -> float:
    """The gradient of a gate is what its token and later ones read of earlier ones: all that they read (x.dx of the
    queries), less what they wrote (of the keys), and what the last state holds. This is how large these sums are, and
    so what their difference can be compared with: behind a gate of -80 it is 0."""
    return max(1.0, sum((x.double() * dx.double()).abs().sum(-1).max().item() for x, dx in pairs))


def rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return (found.double() - expected.double()).square().mean().sqrt().item()


def gradients(form: Callable[..., Outputs], args: Sequence[Any], upstream: Outputs, **keywords: Any) -> list[Any]:
    """Gradients of a form's outputs with respect to its float arguments by autograd, None for the others."""
    leaves = [x.detach().clone().requires_grad_() if is_float(x) else x for x in args]
    outputs = form(*leaves, **keywords)
    pairs = [(o, g.to(o.dtype)) for o, g in zip(outputs, upstream, strict=True) if o.requires_grad]
    wanted = [x for x in leaves if is_float(x)]
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    return [next(found) if is_float(x) else None for x in leaves]


def is_float(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.is_floating_point()


def drawn_like(outputs: Outputs, seed: int = 1) -> list[torch.Tensor]:
    """Upstream gradients: normal numbers of the outputs' shapes and dtypes."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs]


def assert_errs_at_most_twice(found: Outputs, eager: Outputs, expected: Outputs) -> None:
    """What a kernel gives in half precision is at most twice as far from the truth as what PyTorch's operators give on
    the same tensors."""
    for n, (a, b, truth) in enumerate(zip(found, eager, expected, strict=True)):
        if truth is not None:
            assert rms(a, truth) <= 2 * rms(b, truth), f"{n}: {rms(a, truth):.1e}, PyTorch {rms(b, truth):.1e}"
