"""Adapters into the weights that they are on: each becomes one matrix again, and nothing of them is left to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from linearize.passes.calibrate.add_adapters import ADAPTERS, AddAdapters
from linearize.passes.lower.raise_linears import own_containers
from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import Editor
from linearize.rewriting.walk import attribute, evaluate
from linearize.weights import Change


@dataclass(frozen=True)
class MergeAdapters:
    """The source's own weights stay as they are: merged ones are parameters of the new program."""

    name: ClassVar[str] = "merge_adapters"
    stage: ClassVar[Stage] = Stage.CALIBRATE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        module = own_containers(program.copy_graph())
        editor = Editor(module, self.name)
        made = (node for node in module.graph.nodes if node.meta.get("rule") == AddAdapters.name)
        sums = [node for node in made if "origin" in node.meta]
        weights = program.weights
        if weights is not None:
            weights = weights.changed({str(node.args[0].target): _adding(module, node) for node in sums})
        else:
            for node in sums:
                (weight,) = evaluate(module, [node], {})
                set_parameter(module, str(node.args[0].target), weight)
        for node in sums:
            editor.replace(node, node.args[0])
        finished = editor.finish()
        if hasattr(finished, ADAPTERS):
            delattr(finished, ADAPTERS)
        return program.replace(module=finished, weights=weights)


def _adding(module: fx.GraphModule, node: fx.Node) -> Change:
    """What the graph makes of the weight at `node`, of a model that stays on disk; done when the weight is read."""
    scaled = node.args[1].args[0]  # type: ignore[union-attr]
    product, scale = scaled.args  # type: ignore[union-attr]
    b, a = (attribute(module, str(read.target)).detach() for read in product.args)  # type: ignore[union-attr]
    return lambda weight: weight + (b @ a * scale).to(weight.dtype)


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """A new parameter of that name, in the place of the old one."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value.detach().clone(), requires_grad=False))
