"""One node for the batch and one for the length, both read from the token ids.

Tracing reads them from whichever input came first (the mask, the positions), so the same dim has several names.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from linearize.pipeline import Keeps, Stage
from linearize.program import TOKENS, Program
from linearize.rewriting.editor import remove_dead
from linearize.rewriting.walk import is_op


@dataclass(frozen=True)
class UnifySizes:
    name: ClassVar[str] = "unify_sizes"
    stage: ClassVar[Stage] = Stage.NORMALISE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        module = program.copy_graph()
        graph = module.graph
        inputs = [node for node in graph.nodes if node.op == "placeholder"]
        tokens = next(node for node in inputs if node.target == TOKENS)
        old = [node for node in graph.nodes if is_op(node, torch.ops.aten.sym_size) and node.args[0] in inputs]
        if not old:
            return program
        with graph.inserting_after(inputs[-1]):
            length = _size(graph, tokens, 1)
            batch = _size(graph, tokens, 0)
        for node in old:
            node.replace_all_uses_with(batch if node.args[1] == 0 else length)
            graph.erase_node(node)
        remove_dead(graph)
        module.recompile()
        return program.replace(module=module)


def _size(graph: fx.Graph, tokens: fx.Node, dim: int) -> fx.Node:
    node = graph.call_function(torch.ops.aten.sym_size.int, (tokens, dim))
    node.meta["val"] = tokens.meta["val"].shape[dim]
    return node
