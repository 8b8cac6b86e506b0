"""Remove run-time assertions that tracing leaves: a walk along a chain of operators would stop at them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import remove_dead
from linearize.rewriting.walk import is_op

ASSERTIONS = (
    torch.ops.aten._assert_tensor_metadata,
    torch.ops.aten._assert_scalar,
    torch.ops.aten._assert_async,
    torch.ops.aten.sym_constrain_range,
    torch.ops.aten.sym_constrain_range_for_size,
)


@dataclass(frozen=True)
class StripAsserts:
    name: ClassVar[str] = "strip_asserts"
    stage: ClassVar[Stage] = Stage.NORMALISE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        module = program.copy_graph()
        for node in reversed(module.graph.nodes):
            if is_op(node, *ASSERTIONS):
                module.graph.erase_node(node)
        remove_dead(module.graph)
        module.recompile()
        return program.replace(module=module)
