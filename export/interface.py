"""What the exported graph takes and gives: tokens, and states, one tensor each (`Plain`, `Compact`) or packed in one a
layer (`genai.py`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from linearize.errors import ExportError
from linearize.export.names import PAST, PRESENT
from linearize.program import StateTensor

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel

EXAMPLE = {"batch": 2, "length": 5, "past": 3, "total": 9}  # they differ, so that no dim is taken for another
Dims = dict[int, Any]


@dataclass(frozen=True)
class Part:
    """Where one state of the model lies in a packed one: numbers `start` .. of a row."""

    name: str
    start: int
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Port:
    """A state tensor of the graph: its output name of one call feeds its input name of the next."""

    past: str
    present: str
    state: StateTensor
    parts: tuple[Part, ...] = ()

    @property
    def grows(self) -> int | None:
        """The dim of the whole tensor, batch included, whose length is the number of tokens seen."""
        return None if self.state.grows is None else self.state.grows + int(self.state.batched)


class Interface(Protocol):
    """`module` maps the inputs of `token_inputs`, then one tensor a port, to logits and one tensor a port."""

    ports: tuple[Port, ...]
    module: nn.Module

    def token_inputs(self) -> dict[str, tuple[str, str]]:
        """Inputs that are no states, by name, with the names of their two dims."""

    def pack(self, states: Mapping[str, Tensor]) -> list[Tensor]:
        """The model's states as the ports hold them."""


class Plain:
    """The lowered graph as it is."""

    def __init__(self, compiled: LinearizedModel) -> None:
        self.module: nn.Module = compiled.graph_module
        names = compiled.program.input_names()
        self.ports = tuple(Port(PAST + spec.name, PRESENT + spec.name, spec) for spec in compiled.state_specs)
        self._tokens = [name for name in names if name not in compiled.program.state_names]

    def token_inputs(self) -> dict[str, tuple[str, str]]:
        return {name: ("batch", "length") for name in self._tokens}

    def pack(self, states: Mapping[str, Tensor]) -> list[Tensor]:
        return list(states.values())


class Compact:
    """States as the operators of the exported graph read them.

    Rings and sinks stand heads first, [G,n,d] instead of [n,G,d], so that none is transposed at every step, and the m
    sinks of a ring before it in one tensor, `.._near_k` [G,m+n,d], which is what Attention reads. Which
    tokens a ring holds is the same in all layers of one window with as many sinks, so they share one `ring_mask`. With
    `join`, a normaliser z [G,F] is the last column of its sum s [G,F,dv], as LinearAttention updates both at once.
    """

    def __init__(self, compiled: LinearizedModel, join: bool) -> None:
        plain = Plain(compiled)
        self.token_inputs = plain.token_inputs
        specs = {spec.name: spec for spec in compiled.state_specs}
        first: dict[tuple[int, ...], str] = {}
        self.source = {name: first.setdefault(_kind_of_mask(name, specs), name) if name.endswith(MASKS) else name
                       for name in specs}  # fmt: skip
        self.joined = {name + "_s": name + "_z" for name in stems(specs)} if join else {}
        self.turned = {name for name in specs if name.endswith(TURNED) and len(specs[name].shape) == 3}
        self.near = {ring: sink for ring, sink in rings_with_sinks(specs) if {ring, sink} <= self.turned}
        self.windows = {ring: specs[ring].shape[0] for ring in self.near}
        hidden = {name for name, source in self.source.items() if source != name}
        hidden |= {*self.joined.values(), *self.near.values()}
        self.stored = [name for name in specs if name not in hidden]
        self.ports = tuple(self._port(specs[name], specs) for name in self.stored)
        self.module: nn.Module = _Compact(compiled.graph_module, self, len(self.token_inputs()))

    def _port(self, spec: StateTensor, specs: Mapping[str, StateTensor]) -> Port:
        name, shape = spec.name, spec.shape
        if name in self.joined:
            shape = (*shape[:-1], shape[-1] + 1)
        elif name in self.near:
            count, heads, dim = shape
            name, shape = name.replace("_ring_", "_near_"), (heads, specs[self.near[name]].shape[0] + count, dim)
        elif name in self.turned:
            shape = (shape[1], shape[0], shape[2])
        return Port(PAST + name, PRESENT + name, replace(spec, shape=shape))

    def pack(self, states: Mapping[str, Tensor]) -> list[Tensor]:
        for name, source in self.source.items():
            if source != name and not torch.equal(states[name], states[source]):
                raise ExportError(f"{name} and {source} hold other tokens, though their windows are alike")
        return self.store(states)

    def store(self, states: Mapping[str, Tensor]) -> list[Tensor]:
        return [self._stored(name, states) for name in self.stored]

    def _stored(self, name: str, states: Mapping[str, Tensor]) -> Tensor:
        if name in self.near:
            return torch.cat([states[part].transpose(1, 2) for part in (self.near[name], name)], dim=2)
        if name in self.turned:
            return states[name].transpose(1, 2).contiguous()
        if name in self.joined:
            return torch.cat([states[name], states[self.joined[name]].unsqueeze(-1)], dim=-1)
        return states[name]

    def restore(self, stored: Sequence[Tensor]) -> list[Tensor]:
        """The model's states in its order."""
        held = dict(zip(self.stored, stored, strict=True))
        for ring, sink in self.near.items():
            first = held[ring].shape[2] - self.windows[ring]
            held[sink], held[ring] = held[ring][:, :, :first], held[ring][:, :, first:]
        found = {name: held[source].transpose(1, 2) if name in self.turned else held[source]
                 for name, source in self.source.items() if source in held}  # fmt: skip
        for name, norm in self.joined.items():
            found[name], found[norm] = held[name][..., :-1], held[name][..., -1:].squeeze(-1)
        return [found[name] for name in self.source]


MASKS, TURNED = "_ring_mask", ("_ring_k", "_ring_v", "_sink_k", "_sink_v")


def stems(specs: Mapping[str, StateTensor]) -> list[str]:
    """What sums with a normaliser are called without their last letter."""
    found = [name.removesuffix("_z") for name in specs if name.endswith("_z")]
    pairs = [(stem, specs.get(stem + "_s"), specs[stem + "_z"]) for stem in found]
    return [stem for stem, sums, norm in pairs if sums is not None and sums.shape[:-1] == norm.shape]


def rings_with_sinks(specs: Mapping[str, StateTensor]) -> list[tuple[str, str]]:
    """Names of rings, and of the sinks of each."""
    found = [(name, name.replace("_ring_", "_sink_")) for name in specs if name.endswith(TURNED[:2])]
    return [(ring, sink) for ring, sink in found if sink in specs]


def _kind_of_mask(name: str, specs: Mapping[str, StateTensor]) -> tuple[int, ...]:
    """(keys in the window, sinks)."""
    sinks = specs.get(name.removesuffix(MASKS) + "_sink_k")
    return (*specs[name].shape, sinks.shape[0] if sinks else 0)


class _Compact(nn.Module):
    """(tokens, stored states) -> (logits, stored states)."""

    def __init__(self, graph: nn.Module, compact: Compact, tokens: int) -> None:
        super().__init__()
        self.graph_module, self.compact, self.tokens = graph, compact, tokens

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        states = self.compact.restore(inputs[self.tokens :])
        logits, *new = self.graph_module(*inputs[: self.tokens], *states)
        return (logits, *self.compact.store(dict(zip(self.compact.source, new, strict=True))))


def example_inputs(interface: Interface) -> tuple[tuple[Tensor, ...], list[Dims]]:
    """One tensor of its own for each input (the same one twice would alias two inputs of the graph), and its dims."""
    names = interface.token_inputs()
    free = {name: torch.export.Dim(name, min=0 if name == "past" else 1) for name in EXAMPLE}
    tensors: list[Tensor] = [torch.ones([EXAMPLE[dim] for dim in dims], dtype=torch.int64) for dims in names.values()]
    free_dims: list[Dims] = [{place: free[dim] for place, dim in enumerate(dims)} for dims in names.values()]
    for port in interface.ports:
        tensor = port.state.zeros(EXAMPLE["batch"])
        dims: Dims = {0: free["batch"]} if port.state.batched else {}
        if port.grows is not None:
            sizes = [EXAMPLE["past"] if dim == port.grows else size for dim, size in enumerate(tensor.shape)]
            tensor, dims = tensor.new_zeros(sizes), dims | {port.grows: free["past"]}
        tensors.append(tensor)
        free_dims.append(dims)
    return tuple(tensors), free_dims
