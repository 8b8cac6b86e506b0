"""Questions to a graph, answered by data flow and by value. Nothing here edits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from linearize.weights import ATTACHED, Weights

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
    """Values of `targets` when the nodes in `given` have the given values; only what is needed is computed, and each
    value is let go of behind its last use.

    Constants that the graph makes on the meta device are made where the weights are, or on the CPU, so masks and
    positions of a model without weights can be read too. Parameters of a model that stays on disk (`linearize.weights`)
    are read where they are used.
    """
    with torch.no_grad():
        return evaluate_differentiably(module, targets, given)


def evaluate_differentiably(
    module: fx.GraphModule, targets: list[fx.Node], given: dict[fx.Node, Any]
) -> list[Any]:
    """`evaluate` where gradients are wanted by what is given."""
    values = dict(given)
    needed = [node for node in ordered(cone(targets, given), module.graph) if node not in values]
    uses = Counter(arg for node in needed for arg in node.all_input_nodes)
    uses.update(targets)
    for node in needed:
        if node.op == "get_attr" and node not in targets:
            continue
        values[node] = _run(node, module, values)
        for arg in node.all_input_nodes:
            uses[arg] -= 1
            if not uses[arg]:
                values.pop(arg, None)
    return [values[target] for target in targets]


def ordered(nodes: set[fx.Node], graph: fx.Graph) -> list[fx.Node]:
    """`nodes` as they stand in the graph."""
    if len(nodes) * 4 > len(graph.nodes):
        return [node for node in graph.nodes if node in nodes]
    return sorted(nodes)  # fx nodes compare by position in their graph


def _run(node: fx.Node, module: fx.GraphModule, values: dict[fx.Node, Any]) -> Any:
    if node.op == "get_attr":
        return parameter(module, str(node.target))
    args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: _value(arg, module, values))
    if str(kwargs.get("device")) == "meta":
        kwargs = {**kwargs, "device": place_of(module)}
    if node.op == "call_module":
        return attribute(module, str(node.target))(*args, **kwargs)
    if node.op != "call_function":
        raise ValueError(f"no value given for {node.op} {node.name}")
    return node.target(*args, **kwargs)  # type: ignore[operator]


def _value(node: fx.Node, module: fx.GraphModule, values: dict[fx.Node, Any]) -> Any:
    """A parameter is read anew wherever it is used: the graph reads all of them at its top."""
    return parameter(module, str(node.target)) if node.op == "get_attr" and node not in values else values[node]


def parameter(module: torch.nn.Module, name: str) -> Any:
    """What the graph finds under a name: the module's own, or from disk where the module has it without values."""
    value = attribute(module, name)
    weights: Weights | None = getattr(module, ATTACHED, None)
    return weights.get(name) if weights is not None and name in weights and value.is_meta else value


def place_of(module: torch.nn.Module) -> torch.device:
    """Where the values of a module on the meta device are computed."""
    weights: Weights | None = getattr(module, ATTACHED, None)
    return weights.device if weights is not None else torch.device("cpu")


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The node's shape, symbolic dims as SymInts; () where it is no tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, torch.Tensor) else ()


def is_op(node: Any, *packets: Any) -> bool:
    """Whether `node` calls an overload of one of the operator packets (`torch.ops.aten.add`, ...)."""
    target = getattr(node, "target", None)
    return isinstance(target, torch._ops.OpOverload) and target.overloadpacket in packets


def swaps_last_two(node: Any) -> bool:
    """Whether `node` is the transpose of its last two dims."""
    rank = len(shape_of(node)) if isinstance(node, fx.Node) else 0
    if not is_op(node, torch.ops.aten.transpose) or rank < 2:
        return False
    return {dim % rank for dim in node.args[1:3]} == {rank - 2, rank - 1}


def walk_back(node: fx.Node, through: Callable[[fx.Node], bool]) -> fx.Node:
    """Follow first arguments back while `through` holds; the first node for which it does not."""
    while through(node) and node.args and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


def concrete_shape(node: fx.Node, sizes: dict[str, int]) -> tuple[int, ...]:
    """The node's shape with numbers for its symbols, `sizes` by the symbol's name.

    Raises:
        ValueError: a dim has another symbol.
    """
    return tuple(dim if isinstance(dim, int) else _number(dim, sizes) for dim in shape_of(node))


def _number(dim: Any, sizes: dict[str, int]) -> int:
    expression = dim.node.expr
    value = expression.subs({symbol: sizes[str(symbol)] for symbol in expression.free_symbols if str(symbol) in sizes})
    if not value.is_Integer:
        raise ValueError(f"the size {dim} is not made of the batch and the length alone")
    return int(value)


class Dominators:
    """Dominator tree of the part of a graph that depends on the token embedding; built once per program.

    The graph is acyclic and in order, so one pass suffices: a node's parent is the nearest common ancestor of its
    inputs (Cooper, Harvey and Kennedy 2001, without the iteration).
    """

    def __init__(self, root: fx.Node, members: set[fx.Node], graph: fx.Graph) -> None:
        self._root = root
        self._parent: dict[fx.Node, fx.Node] = {root: root}
        self._depth: dict[fx.Node, int] = {root: 0}
        for node in graph.nodes:
            inputs = [arg for arg in node.all_input_nodes if arg in self._depth] if node in members else []
            if node is not root and inputs:
                self._parent[node] = parent = self._meet(inputs)
                self._depth[node] = self._depth[parent] + 1

    def chain(self, node: fx.Node) -> Iterator[fx.Node]:
        """`node`, then its dominators from the nearest to the root; nothing when the root does not reach it."""
        if node not in self._depth:
            return
        while node is not self._root:
            yield node
            node = self._parent[node]
        yield node

    def nearest_common(self, nodes: Iterable[fx.Node]) -> fx.Node | None:
        """The nearest node through which every path to every one of `nodes` goes (a node dominates itself)."""
        found = list(nodes)
        if not found or not all(node in self._depth for node in found):
            return None
        return self._meet(found)

    def _meet(self, nodes: list[fx.Node]) -> fx.Node:
        first = nodes[0]
        for other in nodes[1:]:
            while first is not other:
                if self._depth[first] >= self._depth[other]:
                    first = self._parent[first]
                else:
                    other = self._parent[other]
        return first
