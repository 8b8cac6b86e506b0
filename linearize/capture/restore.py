"""The model as it was: attributes, buffers by value, hooks and containers, put back after every try.

Models cache tensors in forward, in attributes and in dicts or objects that hang on them; while tracing those are
FakeTensors, which must not outlive the trace.
"""

from __future__ import annotations

import types
from collections import OrderedDict, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

CONTAINERS = (dict, OrderedDict, defaultdict, list, set)
OPAQUE = (nn.Module, torch.Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, str, bytes)
DEPTH = 4  # attribute -> object -> its dict -> what that holds


class Snapshot:
    """What every module of a model holds now. `restore` may be called any number of times."""

    def __init__(self, model: nn.Module) -> None:
        self._held: dict[int, tuple[Any, Any]] = {}
        self._attributes: list[tuple[Any, dict[str, Any]]] = []
        self._seen: set[int] = set()
        for module in model.modules():
            self._keep_attributes(module, DEPTH)
        self._buffers = [
            (buffer, buffer._version, buffer.detach().clone())
            for buffer in model.buffers()
            if buffer.device.type != "meta" and not buffer.is_inference()
        ]

    def restore(self) -> None:
        for owner, attributes in self._attributes:
            owner.__dict__.clear()
            owner.__dict__.update(attributes)
        for container, content in self._held.values():
            if not _same(container, content):
                container.clear()
                container.extend(content) if isinstance(container, list) else container.update(content)
        for buffer, version, value in self._buffers:
            if buffer._version != version:
                with torch.no_grad():
                    buffer.copy_(value)

    def _keep_attributes(self, owner: Any, depth: int) -> None:
        self._attributes.append((owner, dict(owner.__dict__)))
        for value in list(owner.__dict__.values()):
            self._keep(value, depth - 1)

    def _keep(self, value: Any, depth: int) -> None:
        if depth < 0 or id(value) in self._seen or isinstance(value, OPAQUE):
            return
        if type(value) in CONTAINERS:
            self._seen.add(id(value))
            self._held[id(value)] = (value, value.copy())
            for item in value.values() if isinstance(value, dict) else value:
                self._keep(item, depth - 1)
        elif isinstance(getattr(value, "__dict__", None), dict):
            self._seen.add(id(value))
            self._keep_attributes(value, depth)


def _same(container: Any, content: Any) -> bool:
    if len(container) != len(content):
        return False
    if isinstance(container, dict):
        pairs = zip(container.items(), content.items(), strict=True)
        return all(old[0] is new[0] and old[1] is new[1] for old, new in pairs)
    if isinstance(container, set):
        return container == content
    return all(old is new for old, new in zip(container, content, strict=True))


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put `model` back as it is now, whatever happens within."""
    before = Snapshot(model)
    try:
        yield
    finally:
        before.restore()
