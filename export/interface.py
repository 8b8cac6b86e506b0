"""What the exported graph takes and gives: tokens, and states, one tensor each (`Plain`) or packed (`genai.py`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

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
