"""What surrounds a core, by data flow: keys before their repeat over heads, the rotation, projections, hidden state."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import takewhile

import torch
from torch import fx

from linearize.program import MASK, POSITIONS, TOKENS, Program
from linearize.rewriting.editor import kept_for
from linearize.rewriting.walk import Dominators, cone, descendants, evaluate, is_op, shape_of

aten = torch.ops.aten

REPEATS = (
    aten.expand, aten.reshape, aten.view, aten.unsqueeze, aten.clone, aten.repeat_interleave, aten.repeat,
    aten.slice, aten.contiguous, aten.flatten,
)  # fmt: skip
PARAMETER_PRODUCTS = (
    aten.linear, aten.addmm, aten.mm, aten.matmul, aten.bmm, aten.conv1d, aten.convolution,
    aten.einsum,
)  # fmt: skip


@dataclass(frozen=True)
class Flow:
    """Facts of the whole graph that every site needs; computed once.

    `activations` depend on the token embedding, `positional` on positions but not on token values. `kept` nodes stand
    for others before their rotation; `absolute` says how positions are added to the activations, if they are.
    """

    program: Program
    activations: set[fx.Node]
    positional: set[fx.Node]
    dominators: Dominators | None
    products: set[fx.Node]
    kept: dict[str, fx.Node]
    absolute: str = ""


def read_flow(program: Program) -> Flow:
    graph = program.graph
    embedding = next((node for node in graph.nodes if _embeds_tokens(node, program)), None)
    activations = descendants(graph, [embedding]) if embedding is not None else set()
    sources = [node for node in graph.nodes if _is_position_source(node)]
    positional = descendants(graph, sources) - activations
    products = {node for node in graph.nodes if _is_parameter_product(node, activations)}
    dominators = Dominators(embedding, activations, graph) if embedding is not None else None
    return Flow(program, activations, positional, dominators, products, kept_for(graph))


def _embeds_tokens(node: fx.Node, program: Program) -> bool:
    if not is_op(node, aten.embedding, aten.index_select, aten.index):
        return False
    table, ids = node.args[0], node.args[1]
    tokens = next(item for item in program.placeholders() if item.target == TOKENS)
    if not isinstance(table, fx.Node) or table.op != "get_attr" or not isinstance(ids, fx.Node):
        return False
    return tokens in cone([ids]) and not is_op(ids, aten.arange) and _carries_tokens(ids, tokens)


def _carries_tokens(node: fx.Node, tokens: fx.Node) -> bool:
    """Whether the ids' values reach `node`, not only their shape."""
    while node is not tokens:
        inputs = [arg for arg in node.all_input_nodes if isinstance(arg.meta.get("val"), torch.Tensor)]
        if not inputs or is_op(node, aten.ones_like, aten.zeros_like, aten.full_like, aten.new_ones, aten.cumsum):
            return False
        node = inputs[0]
    return True


def _is_position_source(node: fx.Node) -> bool:
    if node.op == "placeholder":
        return node.target in (POSITIONS, MASK)
    return is_op(node, aten.arange) or (is_op(node, aten.slice) and _sliced_by_length(node))


def _sliced_by_length(node: fx.Node) -> bool:
    table = node.args[0]
    return (
        isinstance(table, fx.Node) and table.op == "get_attr" and any(isinstance(arg, fx.Node) for arg in node.args[1:])
    )


def _is_parameter_product(node: fx.Node, activations: set[fx.Node]) -> bool:
    if not is_op(node, *PARAMETER_PRODUCTS):
        return False
    inputs = node.all_input_nodes
    return any(arg in activations for arg in inputs) and any(_from_parameters(arg, activations) for arg in inputs)


def _from_parameters(node: fx.Node, activations: set[fx.Node]) -> bool:
    """A weight, or a tensor made of weights alone (transposed, merged with an adapter)."""
    return node not in activations and any(item.op == "get_attr" and len(shape_of(item)) >= 2 for item in cone([node]))


def before_repeat(flow: Flow, node: fx.Node, heads: int) -> fx.Node:
    """The key or value [B, G, S, d] behind `node` [B, H, S, d], if `node` repeats each of G heads H/G times; proved
    by value on random numbers. `node` itself when nothing is repeated."""
    best, current = node, node
    while is_op(current, *REPEATS) and isinstance(current.args[0], fx.Node):
        current = current.args[0]
        shape = shape_of(current)
        if len(shape) == 4 and isinstance(shape[1], int) and heads % shape[1] == 0 and shape[1] < heads:
            if _repeats(flow, current, node, heads // shape[1]):
                best = current
    return best


def _repeats(flow: Flow, source: fx.Node, target: fx.Node, times: int) -> bool:
    _, heads, _, dim = shape_of(source)
    probe = torch.randn(2, heads, 7, dim, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(2, 7, dtype=torch.int64)
    given: dict[fx.Node, object] = {source: probe}
    given |= {node: ids for node in flow.program.placeholders()}
    try:
        (value,) = evaluate(flow.program.module, [target], given)
    except (RuntimeError, ValueError, KeyError):
        return False
    expected = probe.repeat_interleave(times, dim=1)
    return value.shape == expected.shape and torch.equal(value, expected)


def projections_of(flow: Flow, node: fx.Node) -> list[fx.Node]:
    """The first products with parameters met on the way back from `node`."""
    found, seen, stack = [], set(), [node]
    while stack:
        current = stack.pop()
        if current in seen or current not in flow.activations:
            continue
        seen.add(current)
        if current in flow.products:
            found.append(current)
        else:
            stack.extend(current.all_input_nodes)
    return sorted(found)


def output_projection(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The first product with parameters met on the way forward from the core's output."""
    seen, frontier = set(), [node]
    while frontier:
        current = min(frontier)
        frontier.remove(current)
        for user in current.users:
            if user in flow.products:
                return user
            if user not in seen and user.op == "call_function":
                seen.add(user)
                frontier.append(user)
    return None


def hidden_state(flow: Flow, projections: list[fx.Node], width: int | None) -> fx.Node | None:
    """The [B, T, D] activation that all of `projections` are computed from."""
    if flow.dominators is None or not projections:
        return None
    inputs = [arg for node in projections for arg in node.all_input_nodes if arg in flow.activations]
    node = flow.dominators.nearest_common(inputs)
    for candidate in flow.dominators.chain(node) if node is not None else []:
        shape = shape_of(candidate)
        if len(shape) == 3 and isinstance(shape[-1], int) and (width is None or shape[-1] == width):
            return candidate
    return None


def before_rotation(flow: Flow, node: fx.Node) -> fx.Node | None:
    """The query or key as it was before positions entered it: `node` itself where none do, None where no single
    node of the same shape stands before all of them."""
    projections = set(projections_of(flow, node))
    region = cone([node], stop=projections) & flow.activations
    mixing = [item for item in region - projections if any(arg in flow.positional for arg in item.all_input_nodes)]
    if not mixing or flow.dominators is None:
        return node
    shape = shape_of(node)
    mixed = set(mixing)
    for candidate in flow.dominators.chain(node):
        if candidate not in region:
            return None
        if shape_of(candidate)[-1:] == shape[-1:] and len(shape_of(candidate)) == 4:
            if not cone([candidate], stop=projections) & mixed:
                return candidate if shape_of(candidate)[1] == shape[1] else None
    return None


def parameter_names(flow: Flow, products: list[fx.Node]) -> tuple[str, ...]:
    """Names of the weights (rank 2 and more) that `products` multiply by."""
    names = []
    for product in products:
        for arg in product.all_input_nodes:
            if arg not in flow.activations:
                names += [str(n.target) for n in cone([arg]) if n.op == "get_attr" and len(shape_of(n)) >= 2]
    return tuple(dict.fromkeys(names))


def owner_name(names: tuple[str, ...], fallback: str) -> str:
    """The module that owns an attention: the longest common prefix of its projections' parameter names."""
    if not names:
        return fallback
    parts = [name.split(".")[:-1] for name in names]
    shared = [group[0] for group in takewhile(lambda group: len(set(group)) == 1, zip(*parts, strict=False))]
    if len(set(names)) == 1 or (shared and shared == parts[0] and all(part == shared for part in parts)):
        shared = shared[:-1] or shared
    return ".".join(shared) or fallback or names[0].rpartition(".")[0]
