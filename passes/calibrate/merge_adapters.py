"""Adapters into the weights that they are on: each becomes one matrix again, and nothing of them is left to run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn

from linearize.passes.calibrate.add_adapters import ADAPTERS, AddAdapters
from linearize.passes.lower.raise_linears import own_containers
from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import Editor
from linearize.rewriting.walk import evaluate


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
        for node in sums:
            read = node.args[0]
            (weight,) = evaluate(module, [node], {})
            set_parameter(module, str(read.target), weight)
        for node in sums:
            editor.replace(node, node.args[0])
        finished = editor.finish()
        if hasattr(finished, ADAPTERS):
            delattr(finished, ADAPTERS)
        return program.replace(module=finished)


def set_parameter(module: nn.Module, name: str, value: torch.Tensor) -> None:
    """A new parameter of that name, in the place of the old one."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value.detach().clone(), requires_grad=False))
