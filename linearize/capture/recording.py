"""Watching a model run: what some of its modules are called with and return, and which of them run attention."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree

ATTENTION_CALLS = ("attention", "transformer_encoder_layer_fwd")
SOFTMAXES = ("softmax", "log_softmax", "_softmax", "logsumexp")


@dataclass(frozen=True)
class TensorFact:
    """Shape, dtype, device and order of the dims in memory of one tensor that a module returned."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...]

    @staticmethod
    def of(tensor: Tensor) -> TensorFact:
        strides = tensor.stride()
        order = tuple(sorted(range(tensor.ndim), key=lambda dim: (-strides[dim], dim)))
        return TensorFact(tuple(tensor.shape), tensor.dtype, tensor.device, order)


@dataclass(frozen=True)
class Call:
    """One call of a module: flattened arguments (tensors as copies), flattened results (tensors as facts)."""

    inputs: list[Any]
    inputs_spec: pytree.TreeSpec
    outputs: list[Any]
    outputs_spec: pytree.TreeSpec
    written: tuple[int, ...] = ()

    def tensors(self) -> list[Tensor]:
        return [value for value in self.inputs if isinstance(value, Tensor)]


@dataclass
class Recording:
    """Calls by module name, in order, and how often each module ran attention, of one run of the model."""

    calls: dict[str, list[Call]] = field(default_factory=lambda: defaultdict(list))
    attention: dict[str, int] = field(default_factory=lambda: defaultdict(int))


class _CountAttention(TorchFunctionMode):
    """Adds every call that is attention to the modules that are running. A softmax is attention where it runs over a
    dim as long as the sequence, or over a tensor of rank 4; a router's runs over a few experts."""

    def __init__(self, recording: Recording, running: list[str], length: int) -> None:
        super().__init__()
        self.recording, self.running, self.length = recording, running, length

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._is_attention(func, args, kwargs or {}):
            for name in set(self.running):
                self.recording.attention[name] += 1
        return func(*args, **(kwargs or {}))

    def _is_attention(self, func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> bool:
        name = getattr(func, "__name__", "")
        if any(part in name for part in ATTENTION_CALLS):
            return True
        if name not in SOFTMAXES:
            return False
        scores = args[0] if args else kwargs.get("input")
        dim = kwargs.get("dim", args[1] if len(args) > 1 else -1)
        if not isinstance(scores, Tensor) or not isinstance(dim, int) or not scores.ndim:
            return False
        return scores.ndim >= 4 or scores.shape[dim] in (self.length, self.length + 1)


@contextmanager
def recorded(model: nn.Module, names: Iterable[str], length: int) -> Iterator[Recording]:
    """Record every call of the modules at `names` within; `length` is the sequence's, to know attention by."""
    recording, running = Recording(), [""]
    patched: list[nn.Module] = []
    for name in names:
        module = model.get_submodule(name)
        module.__dict__["forward"] = _recording_forward(name, module.forward, recording, running)
        patched.append(module)
    try:
        with _CountAttention(recording, running, length):
            yield recording
    finally:
        for module in patched:
            _unpatch(module)


def _recording_forward(
    name: str, forward: Callable[..., Any], recording: Recording, running: list[str]
) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        flat, spec = pytree.tree_flatten((args, kwargs))
        copies = [value.clone() if isinstance(value, Tensor) else value for value in flat]
        versions = [_version(value) for value in flat]
        running.append(name)
        try:
            output = forward(*args, **kwargs)
        finally:
            running.pop()
        written = tuple(i for i, value in enumerate(flat) if _version(value) != versions[i])
        outputs, outputs_spec = pytree.tree_flatten(output)
        facts = [TensorFact.of(value) if isinstance(value, Tensor) else value for value in outputs]
        recording.calls[name].append(Call(copies, spec, facts, outputs_spec, written))
        return output

    run.__dict__["original"] = forward
    return run


def _version(value: Any) -> int:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else 0


def _unpatch(module: nn.Module) -> None:
    """Give a module its own forward back: the one of its class, or the one that was set on the instance."""
    original = module.__dict__.pop("forward").__dict__["original"]
    if getattr(original, "__func__", None) is not type(module).forward:
        module.__dict__["forward"] = original
