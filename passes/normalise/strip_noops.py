"""Remove operators that return their input.

Full slices, detach, dropout in inference, casts to the same dtype, reshapes and expansions to the same shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import remove_dead
from linearize.rewriting.walk import MAX_INDEX, is_op, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class StripNoops:
    name: ClassVar[str] = "strip_noops"
    stage: ClassVar[Stage] = Stage.NORMALISE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        module = program.copy_graph()
        for node in list(module.graph.nodes):
            if _returns_its_input(node):
                node.replace_all_uses_with(node.args[0])
                module.graph.erase_node(node)
        remove_dead(module.graph)
        module.recompile()
        return program.replace(module=module)


def _returns_its_input(node: fx.Node) -> bool:
    if is_op(node, aten.alias, aten.detach, aten.lift_fresh_copy, aten.contiguous):
        return isinstance(node.args[0], fx.Node)
    if is_op(node, aten.slice):
        start, end, step = (*node.args[2:], None, None, None)[:3]
        return start in (None, 0) and end in (None, MAX_INDEX) and step in (None, 1)
    if is_op(node, aten.dropout, aten.native_dropout):
        return is_op(node, aten.dropout) and (node.args[2] is False or bool(node.args[1] == 0.0))
    if is_op(node, aten._to_copy, aten.to, aten.clone):
        return _same_tensor(node)
    return is_op(node, aten.reshape, aten.view, aten.expand) and _same_shape(node)


def _same_shape(node: fx.Node) -> bool:
    before, after = (
        list(map(str, shape_of(item))) if isinstance(item, fx.Node) else [] for item in (node.args[0], node)
    )
    return bool(before) and before == after


def _same_tensor(node: fx.Node) -> bool:
    before, after = (getattr(item, "meta", {}).get("val") for item in (node.args[0], node))
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    return before.dtype == after.dtype and before.device == after.device
