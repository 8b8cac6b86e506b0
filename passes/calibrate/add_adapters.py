"""Low-rank adapters on named weights: W becomes W + s B A, with A and B parameters of the graph's own.

A [r, in] starts at random, B [out, r] at 0, s = 2 / sqrt(r) (rank-stabilised LoRA, Kalajdzievski 2023), so that the
model is the same at first. The sum is formed in the graph and takes the place of W wherever W is read, so it does not
matter how the product with W is spelled; `merge_adapters` then only writes down what the graph computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from linearize.errors import RewriteError
from linearize.passes.lower.raise_linears import own_containers
from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import Editor

aten = torch.ops.aten
ADAPTERS = "linearize_adapters"


class Adapter(nn.Module):
    """A and B of one weight, float32 at least."""

    def __init__(self, weight: nn.Parameter, rank: int, generator: torch.Generator, place: torch.device) -> None:
        super().__init__()
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        rows, columns = weight.shape
        start = torch.randn(rank, columns, generator=generator, dtype=dtype) * columns**-0.5
        self.a = nn.Parameter(start.to(place))
        self.b = nn.Parameter(torch.zeros(rows, rank, dtype=dtype, device=place))


@dataclass(frozen=True)
class AddAdapters:
    """Adapters of `rank` on the matrices of these names."""

    parameters: tuple[str, ...]
    rank: int = 16
    seed: int = 0

    name: ClassVar[str] = "add_adapters"
    stage: ClassVar[Stage] = Stage.CALIBRATE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        """
        Raises:
            RewriteError: a name is no matrix that the graph reads.
        """
        module = own_containers(program.copy_graph())
        editor = Editor(module, self.name)
        adapters = nn.ModuleList()
        module.add_submodule(ADAPTERS, adapters)
        generator = torch.Generator().manual_seed(self.seed)
        reads = [node for node in module.graph.nodes if node.op == "get_attr"]
        for index, name in enumerate(self.parameters):
            own = [node for node in reads if node.target == name]
            if not own or module.get_parameter(name).dim() != 2:
                raise RewriteError(f"{name} is no matrix that the graph reads, so it cannot have an adapter")
            weight = module.get_parameter(name)
            adapters.append(Adapter(weight, self.rank, generator, program.place))
            for node in own:
                self._add(editor, node, index, weight.dtype)
        return program.replace(module=editor.finish())

    def _add(self, editor: Editor, node: torch.fx.Node, index: int, dtype: torch.dtype) -> None:
        users = list(node.users)
        with editor.graph.inserting_after(node):
            a = editor.graph.get_attr(f"{ADAPTERS}.{index}.a")
        with editor.graph.inserting_after(a):
            b = editor.graph.get_attr(f"{ADAPTERS}.{index}.b")
        with editor.at(b.next):
            product = editor.call(aten.matmul.default, b, a)
            scaled = editor.call(aten.mul.Tensor, product, scale_of(self.rank))
            same = editor.call(aten._to_copy.default, scaled, dtype=dtype)
            whole = editor.call(aten.add.Tensor, node, same, origin=node)
        if "val" in node.meta:
            whole.meta["val"] = node.meta["val"]
        for user in users:
            user.replace_input_with(node, whole)


def scale_of(rank: int) -> float:
    return 2.0 / float(rank) ** 0.5
