"""Questions to a graph, answered by data flow and by value. Nothing here edits."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import networkx as nx
import torch
from torch import fx

MAX_INDEX = 9223372036854775807


def descendants(graph: fx.Graph, sources: Iterable[fx.Node]) -> set[fx.Node]:
    """`sources` and every node whose value depends on one of them."""
    reached = set(sources)
    for node in graph.nodes:
        if node not in reached and any(arg in reached for arg in node.all_input_nodes):
            reached.add(node)
    return reached


def cone(targets: Iterable[fx.Node], stop: Iterable[fx.Node] = ()) -> set[fx.Node]:
    """`targets` and every node that they depend on, not going beyond the nodes in `stop` (which are included)."""
    boundary, seen, stack = set(stop), set(), list(targets)
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in boundary:
            stack.extend(node.all_input_nodes)
    return seen


def attribute(module: torch.nn.Module, target: str) -> Any:
    """The parameter, buffer or submodule at a dotted path."""
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def evaluate(module: fx.GraphModule, targets: list[fx.Node], given: dict[fx.Node, Any]) -> list[Any]:
    """Values of `targets` when the nodes in `given` have the given values; only what is needed is computed.

    Constants that the graph makes on the meta device are made on the CPU, so masks and positions of a model without
    weights can be read too.
    """
    values = dict(given)
    needed = _in_order(cone(targets, given), module.graph)
    with torch.no_grad():
        for node in needed:
            if node not in values:
                values[node] = _run(node, module, values)
    return [values[target] for target in targets]


def _in_order(nodes: set[fx.Node], graph: fx.Graph) -> list[fx.Node]:
    if len(nodes) * 4 > len(graph.nodes):
        return [node for node in graph.nodes if node in nodes]
    return sorted(nodes)  # fx nodes compare by position in their graph


def _run(node: fx.Node, module: fx.GraphModule, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return attribute(module, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: values[arg])
    if str(kwargs.get("device")) == "meta":
        kwargs = {**kwargs, "device": torch.device("cpu")}
    if node.op == "call_module":
        return attribute(module, str(node.target))(*args, **kwargs)
    if node.op != "call_function":
        raise ValueError(f"no value given for {node.op} {node.name}")
    return node.target(*args, **kwargs)  # type: ignore[operator]


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The node's shape, symbolic dims as SymInts; () where it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def is_op(node: Any, *packets: Any) -> bool:
    """Whether `node` calls an overload of one of the operator packets (`torch.ops.aten.add`, ...)."""
    target = getattr(node, "target", None)
    return isinstance(target, torch._ops.OpOverload) and target.overloadpacket in packets


def walk_back(node: fx.Node, through: Callable[[fx.Node], bool]) -> fx.Node:
    """Follow first arguments back while `through` holds; the first node for which it does not."""
    while through(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


class Dominators:
    """Dominator tree of the part of a graph that depends on the token embedding; built once per program."""

    def __init__(self, root: fx.Node, members: set[fx.Node]) -> None:
        flow: nx.DiGraph = nx.DiGraph()
        flow.add_node(root)
        for node in members:
            flow.add_edges_from((arg, node) for arg in node.all_input_nodes if arg in members)
        self._root = root
        self._parent = nx.immediate_dominators(flow, root)

    def chain(self, node: fx.Node) -> list[fx.Node]:
        """`node`, then its dominators from the nearest to the root; [] when the root does not reach it."""
        if node is not self._root and node not in self._parent:
            return []
        result = [node]
        while node is not self._root:
            node = self._parent[node]
            result.append(node)
        return result

    def nearest_common(self, nodes: Iterable[fx.Node]) -> fx.Node | None:
        """The nearest node through which every path to every one of `nodes` goes (a node dominates itself)."""
        chains = [self.chain(node) for node in nodes]
        if not chains or not all(chains):
            return None
        shared = set(chains[0]).intersection(*chains[1:])
        return next((node for node in chains[0] if node in shared), None)
