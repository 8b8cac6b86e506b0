"""Modules without weights (meta device) that need values to run: random numbers on the CPU stand in for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.capture.leaves import shared_copy
from linearize.capture.recording import Call
from linearize.errors import CaptureError

LARGEST = 4 << 30


def with_values(module: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of one of the model's modules with random parameters on the CPU.

    Raises:
        CaptureError: it would take more than 4 GiB.
    """
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if size > LARGEST:
        raise CaptureError(f"without weights its results cannot be learned; random ones would take {size >> 30} GiB")
    made = shared_copy(module, model)
    values = {key: _value(tensor) for key, tensor in tensors.items()}
    for part in made.modules():
        for held in (part._parameters, part._buffers):
            for name, tensor in held.items():
                if tensor is not None:
                    value = values[id(tensor)]
                    held[name] = nn.Parameter(value) if isinstance(tensor, nn.Parameter) else value  # type: ignore[assignment]
    return made


def _value(tensor: Tensor) -> Tensor:
    """Random numbers of the shape and dtype, of unit gain; integers are 0 and 1, which index any table."""
    generator = torch.Generator().manual_seed(0)
    if tensor.is_floating_point():
        scale = max(tensor.shape[-1], 1) ** -0.5 if tensor.ndim >= 2 else 1.0
        return (torch.randn(tensor.shape, generator=generator) * scale).to(tensor.dtype)
    if tensor.dtype == torch.bool:
        return torch.ones(tensor.shape, dtype=torch.bool)
    return (torch.arange(tensor.numel()) % 2).reshape(tensor.shape).to(tensor.dtype)


def valued(value: Any) -> Any:
    """A tensor without values as one with random values on the CPU; anything else as it is."""
    return _value(value) if isinstance(value, Tensor) and value.device.type == "meta" else value


def valued_call(call: Call) -> Call:
    """The call with random inputs on the CPU."""
    return replace(call, inputs=[_activation(value) for value in call.inputs])


def _activation(value: Any) -> Any:
    made = valued(value)
    return made * max(made.shape[-1], 1) ** 0.5 if isinstance(made, Tensor) and made.is_floating_point() else made


def stand_in_forward(module: nn.Module) -> Callable[..., Any]:
    """A forward from tensors without values to tensors without values, run by `module`, which has values."""

    def run(*args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        args, kwargs = pytree.tree_unflatten([_activation(value) for value in flat], spec)
        output, output_spec = pytree.tree_flatten(module(*args, **kwargs))
        bare = [value.to("meta") if isinstance(value, Tensor) else value for value in output]
        return pytree.tree_unflatten(bare, output_spec)

    return run
