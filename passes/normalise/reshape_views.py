"""`view` becomes `reshape`: what a rewrite puts before it may have other strides than the operator it replaced."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.walk import is_op

aten = torch.ops.aten


@dataclass(frozen=True)
class ReshapeViews:
    name: ClassVar[str] = "reshape_views"
    stage: ClassVar[Stage] = Stage.NORMALISE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        module = program.copy_graph()
        for node in module.graph.nodes:
            if is_op(node, aten.view, aten._unsafe_view) and node.target is not aten.view.dtype:
                node.target = aten.reshape.default
        module.recompile()
        return program.replace(module=module)
