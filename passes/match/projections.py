"""Which rows of which parameters q, k, v and the output are projected with, each proved by value.

The rows are found by pushing an arange through the views, cuts and transposes between a product and the first operator
that computes something (a norm, a rotation, attention itself). Then the projection is extracted, run on random numbers
and compared; what does not agree, or has no values (meta device), is not claimed.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx

from linearize.passes.match.region import Flow, projections_of
from linearize.program import TOKENS
from linearize.rewriting.probes import plain_inputs, random_like
from linearize.rewriting.walk import evaluate, is_op, parameter, shape_of
from linearize.spec import Projection, Role

aten = torch.ops.aten
BATCH, LENGTH = 2, 5
MOVES = (
    aten.reshape, aten.view, aten.transpose, aten.permute, aten.unsqueeze, aten.squeeze, aten.split, aten.flatten,
    aten.split_with_sizes, aten.chunk, aten.select, aten.slice, aten.unbind, aten._to_copy, aten.to, aten.clone,
    aten.contiguous, aten.expand, aten.unflatten,
)  # fmt: skip
ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, AttributeError)


@dataclass(frozen=True)
class _Affine:
    """`node` = weight of `source` + bias + adapter: where a projection is complete."""

    node: fx.Node
    source: fx.Node
    claim: Projection


def read_projection(flow: Flow, role: Role, node: fx.Node) -> Projection | None:
    """The projection behind a query, key or value [B,H,T,d], or None where none can be proved."""
    affine = _affine(flow, role, projections_of(flow, node))
    if affine is None:
        return None
    try:
        found = _rows(flow, affine.node, node)
        if found is None:
            return None
        moved, rows = found
        claim = replace(affine.claim, rows=_runs(rows))
        return claim if _agrees(flow, affine, moved, rows) else None
    except ERRORS:
        return None


def read_output(flow: Flow, product: fx.Node | None) -> Projection | None:
    """The projection after the core: its parameter and bias."""
    affine = _affine(flow, "output", [product]) if product is not None else None
    try:
        return affine.claim if affine is not None and _agrees(flow, affine, affine.node, None) else None
    except ERRORS:
        return None


def _affine(flow: Flow, role: Role, products: list[fx.Node]) -> _Affine | None:
    if len(products) == 1:
        return _with_bias(_plain(role, products[0]))
    if len(products) == 2:
        return _with_adapter(flow, role, *products)
    return None


def _plain(role: Role, node: fx.Node) -> _Affine | None:
    """linear(x, W, b), addmm(b, x, W) and matmul(x, W), W a parameter of rank 2 or its transpose."""
    if is_op(node, aten.linear):
        source, weight, bias = (*node.args, None)[:3]
        turned = False
    elif is_op(node, aten.addmm) and not node.kwargs:
        bias, source, weight = node.args
        turned = True
    elif is_op(node, aten.mm, aten.matmul):
        (source, weight), bias, turned = node.args, None, True
    else:
        return None
    if is_op(weight, aten.t, aten.transpose):
        weight, turned = weight.args[0], not turned  # type: ignore[union-attr]
    if not _is_parameter(weight, 2) or not (bias is None or _is_parameter(bias, 1)) or not isinstance(source, fx.Node):
        return None
    bias_name = str(bias.target) if isinstance(bias, fx.Node) else ""
    return _Affine(node, source, Projection(role, str(weight.target), (), bias_name, turned))  # type: ignore[union-attr]


def _is_parameter(node: Any, rank: int) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr" and len(shape_of(node)) == rank


def _with_bias(affine: _Affine | None) -> _Affine | None:
    """A bias added by an operator of its own belongs to the projection."""
    if affine is None or affine.claim.bias or len(affine.node.users) != 1:
        return affine
    (user,) = affine.node.users
    other = [arg for arg in user.args if arg is not affine.node]
    if is_op(user, aten.add) and len(other) == 1 and _is_parameter(other[0], 1) and not user.kwargs:
        return _Affine(user, affine.source, replace(affine.claim, bias=str(other[0].target)))  # type: ignore[union-attr]
    return affine


def _with_adapter(flow: Flow, role: Role, first: fx.Node, second: fx.Node) -> _Affine | None:
    """base(x) + s B(A(x)), the low-rank adapter in either order."""
    for base_node, up_node in ((first, second), (second, first)):
        base, up = _plain(role, base_node), _plain(role, up_node)
        down = _plain(role, up.source) if up is not None and up.source in flow.products else None
        if base is None or up is None or down is None or base.source is not down.source or up.claim.bias:
            continue
        term, scale = up_node, 1.0
        users = list(term.users)
        if len(users) == 1 and is_op(users[0], aten.mul) and isinstance(users[0].args[1], int | float):
            term, scale = users[0], float(users[0].args[1])
        joined = [user for user in term.users if is_op(user, aten.add) and base_node in user.args and not user.kwargs]
        if len(joined) == 1 and not (up.claim.transposed or down.claim.transposed or down.claim.bias):
            claim = replace(base.claim, adapter=(down.claim.parameter, up.claim.parameter), adapter_scale=scale)
            return _Affine(joined[0], base.source, claim)
    return None


def _rows(flow: Flow, start: fx.Node, node: fx.Node) -> tuple[fx.Node, Tensor] | None:
    """(The last node before anything is computed, the output channels of `start` that it holds, by head). Several
    such nodes (halves of a rotation) count as the one that holds all of them."""
    moved = _moved_nodes(flow, start, node)
    if not moved:
        return None
    channels = shape_of(start)[-1]
    value = torch.arange(channels, dtype=torch.float64).expand(_concrete(flow, start))
    given: dict[fx.Node, Any] = {**plain_inputs(flow.program, BATCH, LENGTH), start: value}
    found = [(item, _by_token(flow, item, evaluate(flow.program.module, [item], given)[0])) for item in moved]
    rows = [(item, held[0, 0].long()) for item, held in found if bool((held == held[:1, :1]).all())]
    if len(rows) != len(found):
        return None
    widest = max(rows, key=lambda pair: len(pair[1]))
    inside = set(widest[1].tolist())
    distinct = len(inside) == len(widest[1])
    return widest if distinct and all(set(other.tolist()) <= inside for _, other in rows) else None


def _moved_nodes(flow: Flow, start: fx.Node, node: fx.Node) -> list[fx.Node]:
    """The nodes nearest to `node` that are `start`, moved."""
    found, seen, stack = [], set(), [node]
    while stack:
        current = stack.pop()
        if current in seen or current not in flow.activations:
            continue
        seen.add(current)
        if _only_moved(start, current):
            found.append(current)
        else:
            stack.extend(current.all_input_nodes)
    return found


def _only_moved(start: fx.Node, node: fx.Node) -> bool:
    while node is not start:
        if not (is_op(node, *MOVES) or node.target is operator.getitem) or not isinstance(node.args[0], fx.Node):
            return False
        node = node.args[0]
    return True


def _concrete(flow: Flow, node: fx.Node) -> tuple[int, ...]:
    return tuple(random_like(flow.program, node, BATCH, LENGTH, torch.Generator().manual_seed(0)).shape)


def _by_token(flow: Flow, node: fx.Node, value: Tensor) -> Tensor:
    """[B, T, everything else], the rest in the order in which it stands."""
    tokens = next(item for item in flow.program.placeholders() if item.target == TOKENS)
    names = [str(size) for size in shape_of(node)]
    batch, length = map(str, shape_of(tokens))
    if batch in names and length in names:
        return value.movedim((names.index(batch), names.index(length)), (0, 1)).flatten(2)
    if value.shape[0] != BATCH * LENGTH:
        raise ValueError(f"{node.name} has no dims of batch and length")
    return value.reshape(BATCH, LENGTH, -1)


def _agrees(flow: Flow, affine: _Affine, moved: fx.Node, rows: Tensor | None) -> bool:
    """The claim, computed from the parameters alone, equals the graph."""
    generator = torch.Generator().manual_seed(4)
    source = random_like(flow.program, affine.source, BATCH, LENGTH, generator)
    given = {**plain_inputs(flow.program, BATCH, LENGTH), affine.source: source}
    (value,) = evaluate(flow.program.module, [moved], given)
    if value.is_meta:
        return False
    expected = _by_token(flow, affine.node, apply_projection(flow.program.module, affine.claim, source))
    expected = expected if rows is None else expected[..., rows]
    actual = _by_token(flow, moved, value)
    worst = (actual.float() - expected.float()).abs().max() / expected.float().abs().max().clamp_min(1e-9)
    precise = value.dtype in (torch.float32, torch.float64)
    return actual.shape == expected.shape and bool(worst <= (1e-4 if precise else 3e-2))


def apply_projection(module: fx.GraphModule, claim: Projection, x: Tensor) -> Tensor:
    """All channels of the product that the claim names, from its parameters."""
    with torch.no_grad():
        weight = parameter(module, claim.parameter)
        y: Tensor = x @ (weight if claim.transposed else weight.T)
        if claim.bias:
            y = y + parameter(module, claim.bias)
        if claim.adapter:
            down, up = (parameter(module, name) for name in claim.adapter)
            y = y + claim.adapter_scale * (x @ down.T @ up.T)
        return y


def _runs(rows: Tensor) -> tuple[tuple[int, int], ...]:
    """Runs (first, one past the last) of consecutive rows."""
    numbers = rows.tolist()
    cuts = [0, *(i for i in range(1, len(numbers)) if numbers[i] != numbers[i - 1] + 1), len(numbers)]
    return tuple((numbers[a], numbers[b - 1] + 1) for a, b in pairwise(cuts))
