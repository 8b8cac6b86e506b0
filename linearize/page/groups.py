"""A graph by layer: every node belongs to the layer, or else the module, of the source that it came from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import fx

from linearize.program import LEAF, MIXERS, Program, node_scope, op_name

LAYER = re.compile(r"^(.*?\.\d+|\d+)(?:\.|$)")
LINEAR = {"linear", "addmm", "mm", "matmul", "bmm", "baddbmm", "embedding", "conv1d", "convolution", "einsum"}
ATTENTION = {"scaled_dot_product_attention", "softmax", "_softmax", "_safe_softmax", "attention"}
MOVES = {
    "reshape", "view", "transpose", "permute", "unsqueeze", "squeeze", "expand", "slice", "select", "cat", "getitem",
    "_to_copy", "to", "clone", "contiguous", "split", "chunk", "stack", "flatten", "sym_size", "getattr",
    "t", "type_as",
}  # fmt: skip


@dataclass
class Group:
    """The nodes of one layer or module, in order; `sites` are the attentions in it."""

    name: str
    nodes: list[fx.Node] = field(default_factory=list)
    sites: list[int] = field(default_factory=list)


def groups_of(program: Program) -> list[Group]:
    """Groups in the order of their first nodes. Inputs and parameters are in none: they are read, not computed."""
    modules = {str(site.index): site.module for site in program.sites}
    found: dict[str, Group] = {}
    last = "inputs"
    for node in program.graph.nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        last = group_name(node_scope(node), modules) or last
        found.setdefault(last, Group(last)).nodes.append(node)
    for site in program.sites:
        name = group_name(site.module, modules)
        if name in found:
            found[name].sites.append(site.index)
    return list(found.values())


def group_name(scope: str, modules: dict[str, str]) -> str:
    """`model.layers.3` of what is in it; the mixer of site 3 is where its attention was."""
    if scope.startswith(f"{MIXERS}."):
        scope = modules.get(scope.split(".")[1], scope)
    layer = LAYER.match(scope)
    return layer[1] if layer else scope


def label_of(node: fx.Node) -> str:
    """A node's operator without its namespace."""
    if node.op == "call_module":
        return "leaf" if LEAF in node.meta else "mixer"
    return op_name(node).rpartition(".")[2]


def kind_of(node: fx.Node) -> str:
    """attention, linear, moves (nothing is computed) or other."""
    label = label_of(node)
    if op_name(node).startswith("linearize.") or label in ATTENTION or node.op == "call_module":
        return "attention"
    return "linear" if label in LINEAR else "moves" if label in MOVES else "other"
