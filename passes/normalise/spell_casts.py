"""A cast is `_to_copy`, and says only what it changes: `to(x, dtype)`, `to(x, device, dtype)`, `to(x, like)`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.walk import is_op

aten = torch.ops.aten


@dataclass(frozen=True)
class SpellCasts:
    name: ClassVar[str] = "spell_casts"
    stage: ClassVar[Stage] = Stage.NORMALISE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        if not any(is_op(node, aten.to) for node in program.graph.nodes):
            return program
        module = program.copy_graph()
        for node in module.graph.nodes:
            if is_op(node, aten.to):
                _spell(node)
        module.recompile()
        return program.replace(module=module)


def _spell(node: fx.Node) -> None:
    """In place; one that changes neither dtype nor device stays, for `strip_noops` to remove."""
    source = node.args[0]
    before, after = source.meta.get("val") if isinstance(source, fx.Node) else None, node.meta.get("val")
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return
    wanted = {name: getattr(after, name) for name in ("dtype", "device")}
    changes = {name: value for name, value in wanted.items() if value != getattr(before, name)}
    if changes:
        node.target, node.args, node.kwargs = aten._to_copy.default, (source,), changes
