"""An exported program without mutation and aliases, the cheap way where there is one.

`run_decompositions({})` traces the whole graph a second time, which takes as long as the export and more memory than
it. Most models need nothing of it: all that it would change is how casts and reshapes are spelled, which `normalise`
sees to anyway.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.export import ExportedProgram

aten = torch.ops.aten
COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd
SPELLED = (aten.to, aten.reshape, aten.contiguous)  # by passes/normalise: spell_casts, reshape_views, strip_noops
SIZES = (int, float, torch.SymInt, torch.SymFloat, torch.SymBool)


def functional(exported: ExportedProgram) -> ExportedProgram:
    """The same program if each of its operators is functional or spelled by `normalise`; else decomposed by torch."""
    settled = all(_is_settled(node) for node in exported.graph.nodes if node.op == "call_function")
    return exported if settled else exported.run_decompositions({})


def _is_settled(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return target is operator.getitem or isinstance(node.meta.get("val"), SIZES)
    if target._schema.is_mutable:
        return False
    if target.overloadpacket is aten.dropout:
        return node.args[2] is False
    if target.overloadpacket in SPELLED or not target.has_kernel_for_dispatch_key(COMPOSITE):
        return True
    return not any(argument.alias_info for argument in target._schema.arguments)
