"""Every mixer call becomes the operators it is made of, and each of ours is stamped with the kernel that claims it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from linearize.kernels import registry
from linearize.pipeline import Keeps, Stage
from linearize.program import LEAF, Program
from linearize.rewriting.editor import InliningTracer, remove_dead


@dataclass(frozen=True)
class InlineMixers:
    name: ClassVar[str] = "inline_mixers"
    stage: ClassVar[Stage] = Stage.LOWER
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        module = program.copy_graph()
        graph = module.graph
        tracer = InliningTracer(module, graph)
        for node in list(graph.nodes):
            if node.op == "call_module" and LEAF not in node.meta:
                _inline(tracer, node)
        remove_dead(graph)
        for node in graph.nodes:
            stamp_kernel(node, program.device)
        graph.lint()
        module.recompile()
        return program.replace(module=module)


def _inline(tracer: InliningTracer, call: fx.Node) -> None:
    before = set(tracer.graph.nodes)
    with tracer.graph.inserting_before(call):
        outputs = tracer.inline(str(call.target), list(call.args))  # type: ignore[arg-type]
    for node in tracer.graph.nodes:
        if node not in before:
            node.meta["rule"] = "inline_mixers"
            node.meta["origin"] = call.name
            node.meta["linearize_scope"] = str(call.target)
    for item in list(call.users):
        item.replace_all_uses_with(outputs[item.args[1]])  # type: ignore[index]
        tracer.graph.erase_node(item)
    tracer.graph.erase_node(call)


def stamp_kernel(node: fx.Node, device: torch.device) -> None:
    """Write in the node's meta which kernels may claim it on `device`, the one asked first in front."""
    if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "linearize":
        rows = registry.explain(node.target._opname, device.type)
        node.meta["kernel"] = next((name for name, state in rows if state == "available"), registry.REFERENCE)
        node.meta["kernels_missing"] = [(name, state) for name, state in rows if state != "available"]
