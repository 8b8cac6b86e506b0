"""Copies of named weights for a program that will train them, so that its source keeps its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from linearize.passes.calibrate.merge_adapters import set_parameter
from linearize.passes.lower.raise_linears import own_containers
from linearize.pipeline import Keeps, Stage
from linearize.program import Program


@dataclass(frozen=True)
class OwnWeights:
    """The parameters of these names are the program's own."""

    parameters: tuple[str, ...]

    name: ClassVar[str] = "own_weights"
    stage: ClassVar[Stage] = Stage.CALIBRATE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        module = own_containers(program.copy_graph())
        for name in self.parameters:
            set_parameter(module, name, module.get_parameter(name))
        return program.replace(module=module)
