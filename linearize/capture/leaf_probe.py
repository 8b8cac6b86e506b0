"""Whether an opaque module mixes tokens, by value: change one token of what it is given, see whether others move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.capture.recording import Call, TensorFact
from linearize.errors import CaptureError

TOLERANCE = 1e-4
TOUCHED = (3, 9)
FAR = 100_003


def check_stateless(module: nn.Module, calls: Sequence[Call]) -> None:
    """Calls of several shapes, one after the other, give what the model got from them.

    Raises:
        CaptureError: they do not, since the module keeps a state that something else resets.
    """
    for call in calls:
        expected = [fact.shape for fact in call.outputs if isinstance(fact, TensorFact)]
        try:
            found = [tuple(tensor.shape) for tensor in _run(module, call, call.inputs)]
        except (RuntimeError, IndexError, ValueError):
            found = []
        if found != expected:
            raise CaptureError("it keeps a state from one call to the next")


def mixes_tokens(module: nn.Module, call: Call, batch: int, length: int) -> tuple[bool, bool]:
    """(whether outputs at one token depend on other tokens, whether only positions that lie far apart do that).

    Raises:
        CaptureError: two runs on the same inputs differ, so that nothing can be told.
    """
    before = _run(module, call, call.inputs)
    again = _run(module, call, call.inputs)
    if _moved(before, again, set(), batch, length):
        raise CaptureError("it returns other values each time it is called with the same inputs")
    near = any(
        _moved(before, _run(module, call, _changed(call, token, batch, length, _neighbour)), {token}, batch, length)
        for token in TOUCHED
    )
    if near:
        return True, False
    try:
        after = _run(module, call, _changed(call, TOUCHED[0], batch, length, _far))
    except (IndexError, RuntimeError, ValueError):
        return False, False  # integers that index a table
    return False, _moved(before, after, {TOUCHED[0]}, batch, length)


def _run(module: nn.Module, call: Call, inputs: Sequence[Any]) -> list[Tensor]:
    fresh = [value.clone() if isinstance(value, Tensor) else value for value in inputs]
    args, kwargs = pytree.tree_unflatten(fresh, call.inputs_spec)
    return [value for value in pytree.tree_flatten(module(*args, **kwargs))[0] if isinstance(value, Tensor)]


def _neighbour(values: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    """Other values for one token: noise, or for integers those of the token before, which are in range."""
    if values.is_floating_point():
        noise = torch.randn(values.shape, generator=generator).to(values)
        return values + 3 * noise * values.float().std().clamp_min(0.1).to(values)
    return before


def _far(values: Tensor, before: Tensor, generator: torch.Generator) -> Tensor:
    return values if values.is_floating_point() or values.dtype == torch.bool else values + FAR


def _changed(
    call: Call, token: int, batch: int, length: int, change: Callable[[Tensor, Tensor, torch.Generator], Tensor]
) -> list[Any]:
    generator = torch.Generator().manual_seed(token)
    result = []
    for value in call.inputs:
        if isinstance(value, Tensor):
            value = value.clone()
            for dim in range(value.ndim):
                for at in _indices(value.shape[dim], {token}, batch, length):
                    picked, earlier = value.select(dim, at), value.select(dim, max(at - 1, 0))
                    picked.copy_(change(picked.clone(), earlier.clone(), generator))
        result.append(value)
    return result


def _indices(size: int, tokens: set[int], batch: int, length: int) -> list[int]:
    """Where `tokens` stand along a dim of that size: the length, or batch and length merged."""
    if size == length:
        return sorted(tokens)
    if size == batch * length:
        return [row * length + token for row in range(batch) for token in sorted(tokens)]
    return []


def _moved(before: list[Tensor], after: list[Tensor], tokens: set[int], batch: int, length: int) -> bool:
    """Whether any output differs anywhere but at `tokens`."""
    for old, new in zip(before, after, strict=True):
        if old.shape != new.shape:
            return True
        change = (new.double() - old.double()).abs().nan_to_num(nan=float("inf"))
        change = change.masked_fill(new == old, 0.0)  # infinities too
        scale = old.double().nan_to_num(posinf=0.0, neginf=0.0).abs().max() if old.numel() else torch.tensor(0.0)
        for dim in range(change.ndim):
            at = _indices(change.shape[dim], tokens, batch, length)
            if at:
                change = change.index_fill(dim, torch.tensor(at, device=change.device), 0.0)
        if change.numel() and bool((change > TOLERANCE * scale.clamp_min(1e-9)).any()):
            return True
    return False
