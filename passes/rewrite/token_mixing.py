"""Regions of a graph that look at other tokens and have no state for them, and what each needs to be continued.

A region ends in a node that is not continued from piece to piece and begins at the nearest nodes before it that are and
have a time axis: its entries. What is remembered is its entries' past, in the cheapest form that holds by value:

    sum       a cumulative sum over time: the last sum
    finite K  output t depends on inputs t-K+1 .. t alone, and zeros stand for what came before: the last K-1 inputs
    history   anything else that is causal: all inputs so far
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from linearize.errors import RewriteError
from linearize.program import node_scope, op_name
from linearize.rewriting.continuation import Axes, Continuation
from linearize.rewriting.walk import is_op

aten = torch.ops.aten
COPIES = (
    aten.expand, aten.reshape, aten.view, aten.unsqueeze, aten.clone, aten.repeat_interleave, aten.repeat,
    aten.transpose, aten.permute,
)  # fmt: skip


@dataclass(frozen=True)
class Region:
    """`target` is computed from `entries` by `inner` nodes (target included), given the length of time they see, which
    the nodes in `sizes` read, and `constants` that do not change with it."""

    target: fx.Node
    entries: tuple[fx.Node, ...]
    inner: frozenset[fx.Node]
    sizes: frozenset[fx.Node]
    constants: frozenset[fx.Node]

    @property
    def scope(self) -> str:
        return node_scope(self.target) or self.target.name


def find_region(target: fx.Node, reading: Continuation) -> Region:
    """The region that ends in `target`.

    Raises:
        RewriteError: it would take in a node with state of its own.
    """
    entries, inner, sizes, constants = set(), {target}, set(), set()
    stack, seen = list(target.all_input_nodes), {target}
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node not in reading.varying:
            constants.add(node)
        elif _is_offset(node):
            continue
        elif is_op(node, aten.sym_size) and reading.timed(node.args[0]):  # type: ignore[arg-type]
            sizes.add(node)
        elif _is_entry(node, reading) and _thinnest(node, reading) is node:
            entries.add(node)
        elif node.op in ("placeholder", "call_module") and "linearize_leaf" not in node.meta:
            where = node_scope(target) or target.name
            raise RewriteError(f"{where}: {target.name} = {op_name(target)} goes back to the state {node.name}")
        else:
            inner.add(node)
            stack.extend(node.all_input_nodes)
    return Region(target, tuple(sorted(entries)), frozenset(inner), frozenset(sizes), frozenset(constants))


def _is_offset(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.target == "offset"


def _is_entry(node: fx.Node, reading: Continuation) -> bool:
    return node in reading.right and node in reading.valued and reading.timed(node) is not None


def _thinnest(node: fx.Node, reading: Continuation) -> fx.Node:
    """Where `node` copies or reorders numbers (keys repeated over heads), the node before that."""
    best = current = node
    while is_op(current, *COPIES) and isinstance(current.args[0], fx.Node):
        current = current.args[0]
        axes, least = reading.timed(current), reading.timed(best)
        if axes is None or least is None or not _is_entry(current, reading):
            break
        best = current if axes.numbers <= least.numbers else best
    return best


def timed_axes(reading: Continuation, node: fx.Node) -> Axes:
    axes = reading.timed(node)
    assert axes is not None
    return axes


def is_running_sum(region: Region, reading: Continuation) -> bool:
    """A cumulative sum along time of what is continued itself."""
    target = region.target
    if not is_op(target, aten.cumsum) or target.args[0] not in reading.axes:
        return False
    axes, dim = timed_axes(reading, target), target.args[1]
    return dim in (axes.time, (axes.time or 0) - len(axes.shape)) and axes.batch in (0, None)
