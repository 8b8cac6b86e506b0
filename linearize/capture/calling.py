"""How a model is called while it is captured: which inputs it takes, and where its logits are in what it returns."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from linearize.capture import hf
from linearize.errors import CaptureError
from linearize.program import MASK, POSITIONS, TOKENS

# Both dims differ, are at least 2, odd or unlike any config size: nothing specialises on them by accident.
EXAMPLE_BATCH, EXAMPLE_LENGTH = 2, 13


@dataclass(frozen=True)
class Call:
    """The example inputs by the graph's names, the keyword each goes to in the model's forward, fixed keywords."""

    inputs: dict[str, torch.Tensor]
    keywords: dict[str, str | None]
    fixed: dict[str, Any]

    def without(self, name: str) -> Call:
        """The same call with one input left to the model's default."""
        inputs = {key: value for key, value in self.inputs.items() if key != name}
        return Call(inputs, {key: value for key, value in self.keywords.items() if key != name}, self.fixed)


class LogitsOnly(nn.Module):
    """Positional tensors in, the logits tensor out; what is exported instead of the model itself."""

    def __init__(self, model: nn.Module, call: Call) -> None:
        super().__init__()
        self.model = model
        self._keywords = list(call.keywords.values())
        self._fixed = call.fixed

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        positional = [tensor for tensor, key in zip(tensors, self._keywords, strict=True) if key is None]
        named = {key: tensor for tensor, key in zip(tensors, self._keywords, strict=True) if key is not None}
        return find_logits(self.model(*positional, **named, **self._fixed))


def find_logits(output: Any) -> torch.Tensor:
    """The float tensor of rank 3 in what a model returned: itself, `.logits`, an entry 'logits', or the first of a
    tuple that has that rank."""
    if hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    if isinstance(output, tuple | list):
        found = [item for item in output if isinstance(item, torch.Tensor) and item.ndim == 3]
        output = found[0] if found else output
    if not isinstance(output, torch.Tensor) or output.ndim != 3 or not output.is_floating_point():
        raise CaptureError(
            f"the model returned {_describe(output)}, not logits [batch, length, vocabulary]; "
            "pass a causal language model (with its output head), or wrap it so that it returns logits"
        )
    return output


def describe_call(model: nn.Module, example_inputs: Any) -> Call:
    """Example inputs for `model`: the given ones, or token ids made up for its device."""
    if example_inputs is not None:
        return _given_call(example_inputs)
    accepted = _parameter_names(model)
    ids = torch.arange(EXAMPLE_BATCH * EXAMPLE_LENGTH, device=_device(model)).reshape(EXAMPLE_BATCH, -1) % 2
    inputs = {TOKENS: ids}
    keywords: dict[str, str | None] = {TOKENS: TOKENS if TOKENS in accepted else None}
    fixed: dict[str, Any] = {}
    if hf.is_pretrained(model):
        hf.check_decoder(model)
        if MASK in accepted:
            inputs[MASK], keywords[MASK] = torch.ones_like(ids), MASK
        if POSITIONS in accepted:
            inputs[POSITIONS] = torch.arange(EXAMPLE_LENGTH, device=ids.device).expand_as(ids).contiguous()
            keywords[POSITIONS] = POSITIONS
        fixed = {"use_cache": False} if "use_cache" in accepted else {}
    return Call(inputs, keywords, fixed)


def _given_call(example_inputs: Any) -> Call:
    if isinstance(example_inputs, Mapping):
        inputs = {str(name): value for name, value in example_inputs.items()}
        if TOKENS not in inputs:
            raise CaptureError(f"example_inputs has no {TOKENS!r}: it has {sorted(inputs)}")
        keywords: dict[str, str | None] = {name: name for name in inputs}
    else:
        tensors = list(example_inputs) if isinstance(example_inputs, tuple | list) else [example_inputs]
        if len(tensors) != 1:
            raise CaptureError("example_inputs: pass token ids alone, or a dict of forward's keyword arguments")
        inputs, keywords = {TOKENS: tensors[0]}, {TOKENS: None}
    for name, value in inputs.items():
        if not isinstance(value, torch.Tensor) or value.ndim != 2 or value.is_floating_point():
            raise CaptureError(
                f"example_inputs: {name} must be an integer tensor [batch, length], not {_describe(value)}"
            )
    unknown = set(inputs) - {TOKENS, MASK, POSITIONS}
    if unknown:
        raise CaptureError(f"example_inputs: {sorted(unknown)} not understood; known are {[TOKENS, MASK, POSITIONS]}")
    shape = tuple(max(size, 2) for size in inputs[TOKENS].shape)  # a dim of 1 would be traced as a constant
    return Call({name: value.new_ones(shape).copy_(value) for name, value in inputs.items()}, keywords, {})


def _parameter_names(model: nn.Module) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _device(model: nn.Module) -> torch.device:
    tensor = next(iter(model.parameters()), None)
    return tensor.device if tensor is not None else torch.device("cpu")


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a {str(value.dtype).removeprefix('torch.')} tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"
