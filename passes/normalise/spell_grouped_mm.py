"""The experts of a mixture, sorted rows times the matrix of their group, as `linearize::grouped_mm`.

torch.export meets transformers' fallback operator, which no saved model could name, or aten's own, which ONNX does not
have. A transposed view of the stored matrices becomes the operator's `transposed`, so that nothing copies them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from linearize.ops import grouped_mm
from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import Editor
from linearize.rewriting.walk import shape_of, swaps_last_two

NAMES = ("transformers::grouped_mm_fallback", "aten::_grouped_mm")


@dataclass(frozen=True)
class SpellGroupedMM:
    name: ClassVar[str] = "spell_grouped_mm"
    stage: ClassVar[Stage] = Stage.NORMALISE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        module = program.copy_graph()
        editor = Editor(module, self.name)
        found = [node for node in module.graph.nodes if _is_grouped(node)]
        for node in found:
            x, weight, ends = node.args[0], node.args[1], _ends(node)
            transposed = swaps_last_two(weight)
            matrices = weight.args[0] if transposed else weight
            with editor.at(node):
                new = editor.call(grouped_mm, x, matrices, ends, transposed=transposed, origin=node)
            editor.replace(node, new)
        return program.replace(module=editor.finish()) if found else program


def _is_grouped(node: fx.Node) -> bool:
    """Rows in groups, without bias or another dtype of the result."""
    if not isinstance(node.target, torch._ops.OpOverload) or node.target._schema.name not in NAMES:
        return False
    ranks = [len(shape_of(arg)) if isinstance(arg, fx.Node) else 0 for arg in node.args[:2]]
    others = (*node.args[3:], *(value for key, value in node.kwargs.items() if key != "offs"))
    return ranks == [2, 3] and isinstance(_ends(node), fx.Node) and all(value is None for value in others)


def _ends(node: fx.Node) -> Any:
    return node.args[2] if len(node.args) > 2 else node.kwargs.get("offs")
