"""Opaque leaves: modules that cannot be traced stand in the graph as one node each.

While exporting, a leaf's forward is a custom operator that carries the module's name and knows its output shapes from
runs of the model (`leaf_shapes`). Afterwards the operator becomes a `call_module` node of the module itself, so that
parameters, gradients and running are ordinary. Such a node carries

    node.meta["linearize_leaf"] = {
        "mixes_tokens": whether an output at one token depends on other tokens (found by value, see `leaf_probe`),
        "far_positions": whether it does so only where positions lie far apart (dynamic rotary scaling),
        "reason": why the module could not be traced,
        "outputs": a LeafShapes, f(args, kwargs) -> what the module returns, as tensors without values,
    }
"""

from __future__ import annotations

import copy
import operator
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from linearize.capture.leaf_shapes import LeafShapes, OutputRule, is_constant
from linearize.errors import CaptureError
from linearize.program import LEAF

LIBRARY = torch.library.Library(LEAF, "DEF")
LIBRARY.define("call(Tensor[] tensors, SymInt[] numbers, str key) -> Tensor[]")
CALL = torch.ops.linearize_leaf.call.default


@dataclass
class Leaf:
    """One module that stays opaque: its name, why, and the shapes of each of its calls within one run."""

    name: str
    reason: str
    shapes: list[LeafShapes]
    module: nn.Module
    mixes_tokens: bool = False
    far_positions: bool = False


@dataclass
class _Traced:
    """One call while tracing: what the operator's tensors and numbers are put back into."""

    leaf: Leaf
    shapes: LeafShapes
    template: list[Any]
    spec: pytree.TreeSpec

    def filled(self, tensors: Any, numbers: Any) -> list[Any]:
        """The flattened arguments, tensors and numbers in their places."""
        kinds = {"tensor": tensors, "number": numbers}
        return [kinds[v.kind][v.index] if isinstance(v, _Place) else v for v in self.template]


@dataclass(frozen=True)
class _Place:
    kind: str
    index: int


@dataclass
class Tracing:
    """Calls of leaves met during one export, by the key that the operator carries."""

    calls: dict[str, _Traced] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)


_ACTIVE: dict[str, _Traced] = {}


def _fake(tensors: list[Tensor], numbers: list[int], key: str) -> list[Tensor]:
    call = _ACTIVE[key]
    return call.shapes.tensors(call.filled(tensors, numbers))


def _run(tensors: list[Tensor], numbers: list[int], key: str) -> list[Tensor]:
    """The module itself, for what surrounds it is also run while it stands opaque."""
    call = _ACTIVE[key]
    args, kwargs = pytree.tree_unflatten(call.filled(tensors, numbers), call.spec)
    found = [value for value in pytree.tree_flatten(call.leaf.module(*args, **kwargs))[0] if isinstance(value, Tensor)]
    return [value.clone() for value in found]  # an operator may not return its inputs


torch.library.register_fake(f"{LEAF}::call", _fake, lib=LIBRARY)
LIBRARY.impl("call", _run, "CompositeExplicitAutograd")


@contextmanager
def opaque(model: nn.Module, leaves: dict[str, Leaf]) -> Iterator[Tracing]:
    """Within, the named modules' forwards are the opaque operator. Their hooks are silent: they run with the module.

    The caller restores the modules (`restore.Snapshot`).
    """
    tracing = Tracing()
    for name, leaf in leaves.items():
        module = model.get_submodule(name)
        module.__dict__["forward"] = _opaque_forward(leaf, tracing)
        for hooks in ("_forward_hooks", "_forward_pre_hooks"):
            module.__dict__[hooks] = type(module.__dict__[hooks])()
    _ACTIVE.clear()
    try:
        yield tracing
    finally:
        _ACTIVE.clear()


def _opaque_forward(leaf: Leaf, tracing: Tracing) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        index = tracing.counts[leaf.name]
        tracing.counts[leaf.name] += 1
        key = f"{leaf.name}#{index}"
        flat, spec = pytree.tree_flatten((args, kwargs))
        tensors, numbers, template = _split(flat, leaf.name)
        call = _Traced(leaf, leaf.shapes[index % len(leaf.shapes)], template, spec)
        tracing.calls[key] = _ACTIVE[key] = call
        return call.shapes.unflatten(CALL(tensors, numbers, key), lambda value: value)

    return run


def _split(flat: list[Any], name: str) -> tuple[list[Tensor], list[Any], list[Any]]:
    tensors: list[Tensor] = []
    numbers: list[Any] = []
    template: list[Any] = []
    for value in flat:
        if isinstance(value, Tensor):
            template.append(_Place("tensor", len(tensors)))
            tensors.append(value)
        elif isinstance(value, torch.SymInt):
            template.append(_Place("number", len(numbers)))
            numbers.append(value)
        elif is_constant(value):
            template.append(value)
        else:
            raise CaptureError(f"{name} is called with a {type(value).__name__}, which no graph can hold")
    return tensors, numbers, template


# ---- from the operator to call_module --------------------------------------------------------------------------------


def place_calls(graph: fx.Graph, tracing: Tracing) -> dict[str, Leaf]:
    """Every leaf operator of `graph` becomes a `call_module` of its module. Returns the leaves that are called."""
    placed: dict[str, Leaf] = {}
    for node in list(graph.nodes):
        if node.target is CALL:
            call = tracing.calls[str(node.args[2])]
            _place(graph, node, call)
            placed[call.leaf.name] = call.leaf
    return placed


def _place(graph: fx.Graph, node: fx.Node, call: _Traced) -> None:
    args, kwargs = pytree.tree_unflatten(call.filled(node.args[0], node.args[1]), call.spec)
    leaf = call.leaf
    with graph.inserting_before(node):
        new = graph.call_module(leaf.name, args, kwargs)
        new.meta = {key: value for key, value in node.meta.items() if key != "val"}
        new.meta["linearize_scope"] = leaf.name
        new.meta["val"] = call.shapes.unflatten(node.meta["val"], lambda value: value)
        new.meta[LEAF] = {
            "mixes_tokens": leaf.mixes_tokens,
            "far_positions": leaf.far_positions,
            "reason": leaf.reason,
            "outputs": call.shapes,
        }
        picked = _picked(graph, new, call.shapes, node.meta["val"])
    for item in list(node.users):
        item.replace_all_uses_with(picked[item.args[1]])  # type: ignore[index]
        graph.erase_node(item)
    graph.erase_node(node)
    for unused in reversed([item for item in picked if item is not new and not item.users]):
        graph.erase_node(unused)


def _picked(graph: fx.Graph, call: fx.Node, shapes: LeafShapes, values: list[Tensor]) -> list[fx.Node]:
    """For every output tensor, the node that reads it out of what the module returns."""
    positions = [position for position, rule in enumerate(shapes.outputs) if isinstance(rule, OutputRule)]
    markers = pytree.tree_unflatten(list(range(len(shapes.outputs))), shapes.spec)
    paths = dict(_paths(markers))
    result = []
    for position, value in zip(positions, values, strict=True):
        node = call
        for step in paths[position]:
            node = graph.call_function(step[0], (node, step[1]))
            node.meta = {"linearize_scope": call.meta["linearize_scope"]}
        if node is not call:
            node.meta["val"] = value
        result.append(node)
    return result


def _paths(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """(marker, how to reach it) of every integer in a structure; a step is a function and its second argument."""
    steps: list[tuple[Callable[..., Any], Any, Any]]
    if isinstance(value, Mapping):
        steps = [(operator.getitem, key, item) for key, item in value.items()]
    elif isinstance(value, tuple | list):
        steps = [(operator.getitem, index, item) for index, item in enumerate(value)]
    elif is_dataclass(value):
        steps = [(getattr, part.name, getattr(value, part.name)) for part in fields(value)]
    else:
        yield value, path
        return
    for function, key, item in steps:
        yield from _paths(item, (*path, (function, key)))


def shared_copy(module: nn.Module, model: nn.Module) -> nn.Module:
    """A copy of one of the model's modules in eval mode that shares all parameters and buffers with it. Its mode and
    attributes are its own: what it caches does not appear in the source."""
    memo: dict[int, Any] = {id(part): part for part in model.modules()}
    memo |= {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    for part in module.modules():
        memo[id(part)] = object.__new__(type(part))
    for part in module.modules():
        made = memo[id(part)]
        made.__dict__.update({key: _own(key, value, memo) for key, value in part.__dict__.items()})
        made.__dict__["_modules"] = {name: child and memo[id(child)] for name, child in part._modules.items()}
        made.__dict__["training"] = False
    return memo[id(module)]


def _own(key: str, value: Any, memo: dict[int, Any]) -> Any:
    if key.startswith("_") and isinstance(value, dict | set):
        return value.copy()  # parameters, buffers, hooks
    try:
        return copy.deepcopy(value, memo)
    except Exception:  # a handle, a lock, a tensor within a graph: shared, as it cannot be copied
        return value
