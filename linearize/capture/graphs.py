"""From an ExportedProgram to a plain GraphModule: inputs and parameters under their own names, logits returned."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram

from linearize.capture.leaves import Leaf, Tracing, place_calls, shared_copy
from linearize.program import TOKENS
from linearize.rewriting.walk import attribute

WRAPPED = "model."


def plain_module(
    exported: ExportedProgram, names: list[str], model: nn.Module, tracing: Tracing
) -> tuple[fx.GraphModule, dict[str, Leaf]]:
    """The graph of an exported `LogitsOnly(model)`, its leaves calls of the model's modules; and those leaves."""
    source = exported.module()
    assert isinstance(source, fx.GraphModule)
    graph, attributes = copy_graph(source, names, WRAPPED, output=0)
    leaves = place_calls(graph, tracing)
    modules = {name: shared_copy(model.get_submodule(name), model) for name in leaves}
    return fx.GraphModule(root_of(attributes, modules), graph, class_name="Captured"), leaves


def copy_graph(
    source: fx.GraphModule, names: Sequence[str | None], prefix: str, output: int
) -> tuple[fx.Graph, dict[str, Any]]:
    """A copy of an exported graph with inputs called `names` (None leaves one out), attributes without `prefix`, and
    one output of those it returns; and the attributes by name."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, Any] = {}
    inputs = iter(names)
    for node in source.graph.nodes:
        if node.op == "placeholder":
            name = next(inputs)
            if name is not None:
                mapping[node] = graph.placeholder(name)
                mapping[node].meta = dict(node.meta)
        elif node.op == "get_attr":
            target = str(node.target).removeprefix(prefix)
            attributes[target] = attribute(source, str(node.target))
            mapping[node] = graph.get_attr(target)
            mapping[node].meta = dict(node.meta)
        elif node.op == "output":
            returned = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
            graph.output(mapping[returned[output]])
        elif not (node.op == "call_module" and node.target == "_guards_fn"):
            mapping[node] = graph.node_copy(node, lambda old: mapping[old])
            _strip_wrapper_scope(mapping[node], prefix)
    return graph, attributes


def _strip_wrapper_scope(node: fx.Node, prefix: str) -> None:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    scope = paths[-1] if paths else ""
    if prefix:
        scope = scope.removeprefix(prefix.rstrip(".")).removeprefix(".")
    node.meta["linearize_scope"] = scope


def root_of(attributes: dict[str, Any], modules: dict[str, nn.Module]) -> nn.Module:
    """A module tree that holds `modules` and `attributes` at their names; what a module holds already stays its own."""
    root = nn.Module()
    for name, module in modules.items():
        *path, last = name.split(".")
        _container(root, path).add_module(last, module)
    for name, value in attributes.items():
        if any(name.startswith(f"{owner}.") for owner in modules):
            continue
        *path, last = name.split(".")
        holder = _container(root, path)
        if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
            holder.register_buffer(last, value)
        else:
            setattr(holder, last, value)
    return root


def _container(root: nn.Module, path: list[str]) -> nn.Module:
    for part in path:
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root._modules[part]  # type: ignore[assignment]
    return root


def vocabulary(module: fx.GraphModule) -> int | None:
    """Rows of the table that token ids index, or None where ids meet no embedding."""
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and _is_tokens(node.args[1]):
            return int(node.args[0].meta["val"].shape[0])
    return None


def _is_tokens(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.op == "call_function" and node.args:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target == TOKENS
