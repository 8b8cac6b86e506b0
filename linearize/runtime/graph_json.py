"""A `torch.fx` graph as JSON and back. Reading looks operators up by name in known namespaces and executes nothing."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

import linearize.ops
from linearize.errors import ArtifactError
from linearize.program import StateTensor

assert linearize.ops.OPERATORS  # importing the package is what puts our operators into torch.ops
NAMESPACES = ("aten", "linearize", "prims")
FUNCTIONS: dict[str, Callable[..., Any]] = {
    **{f"operator.{name}": getattr(operator, name) for name in (
        "getitem", "add", "sub", "mul", "floordiv", "truediv", "mod", "neg", "pow", "eq", "ne", "lt", "le", "gt", "ge",
    )},
    **{f"torch.{name}": getattr(torch, name) for name in ("sym_float", "sym_int", "sym_max", "sym_min", "sym_not")},
    **{f"math.{name}": getattr(math, name) for name in ("ceil", "floor", "sqrt")},
}  # fmt: skip
_NAMES = {id(function): name for name, function in FUNCTIONS.items()}


def graph_to_json(graph: fx.Graph) -> list[dict[str, Any]]:
    """One object a node, in order.

    Raises:
        ArtifactError: a node calls something that could not be found again by name.
    """
    return [_node_to_json(node) for node in graph.nodes]


def _node_to_json(node: fx.Node) -> dict[str, Any]:
    data: dict[str, Any] = {"name": node.name, "op": node.op, "target": _target_name(node)}
    if node.args:
        data["args"] = [_encode(arg, node) for arg in node.args]
    if node.kwargs:
        data["kwargs"] = {key: _encode(arg, node) for key, arg in node.kwargs.items()}
    if "state" in node.meta:
        data["state"] = _state_to_json(node.meta["state"])
    if node.meta.get("linearize_scope"):
        data["scope"] = node.meta["linearize_scope"]
    return data


def _target_name(node: fx.Node) -> str:
    if isinstance(node.target, str):
        return node.target
    if isinstance(node.target, torch._ops.OpOverload):
        if node.target.namespace not in NAMESPACES:
            raise ArtifactError(f"node {node.name} calls {node.target}, an operator outside {', '.join(NAMESPACES)}")
        return f"{node.target.namespace}.{node.target._opname}.{node.target._overloadname}"
    if id(node.target) not in _NAMES:
        raise ArtifactError(f"node {node.name} calls {node.target}, which cannot be saved by name")
    return _NAMES[id(node.target)]


def _state_to_json(state: StateTensor) -> dict[str, Any]:
    return {
        "name": state.name, "shape": list(state.shape), "dtype": _short(state.dtype),
        "grows": state.grows, "batched": state.batched,
    }  # fmt: skip


def _encode(value: Any, node: fx.Node) -> Any:
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_encode(item, node) for item in value]
    if isinstance(value, tuple):
        return {"tuple": [_encode(item, node) for item in value]}
    if isinstance(value, slice):
        return {"slice": [_encode(item, node) for item in (value.start, value.stop, value.step)]}
    for kind in (torch.dtype, torch.layout, torch.memory_format):
        if isinstance(value, kind):
            return {kind.__name__: _short(value)}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    raise ArtifactError(f"node {node.name} has an argument that cannot be saved: {value!r}")


def _short(value: Any) -> str:
    return str(value).removeprefix("torch.")


def graph_from_json(rows: list[dict[str, Any]]) -> fx.Graph:
    """The graph again.

    Raises:
        ArtifactError: a row is malformed, or names an operator that this torch does not have.
    """
    graph = fx.Graph()
    nodes: dict[str, fx.Node] = {}
    for row in rows:
        try:
            args = tuple(_decode(arg, nodes) for arg in row.get("args", []))
            kwargs = {key: _decode(arg, nodes) for key, arg in row.get("kwargs", {}).items()}
            node = graph.create_node(row["op"], _target(row["op"], row["target"]), args, kwargs, name=row["name"])
            if "state" in row:
                node.meta["state"] = _state_from_json(row["state"])
        except (KeyError, TypeError, AttributeError, AssertionError) as error:
            raise ArtifactError(f"graph.json: node {row.get('name')!r} is malformed: {error}") from error
        node.meta["linearize_scope"] = row.get("scope", "")
        nodes[row["name"]] = node
    return graph


def _target(op: str, name: str) -> Any:
    if op != "call_function":
        return name
    if name in FUNCTIONS:
        return FUNCTIONS[name]
    namespace, _, rest = name.partition(".")
    packet, _, overload = rest.partition(".")
    if namespace not in NAMESPACES:
        raise ArtifactError(f"graph.json calls {name!r}; only operators of {', '.join(NAMESPACES)} are read")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), packet), overload)
    except AttributeError as error:
        raise ArtifactError(f"graph.json calls {name!r}, which torch {torch.__version__} does not have") from error


def _state_from_json(data: dict[str, Any]) -> StateTensor:
    dtype = _dtype(data["dtype"])
    return StateTensor(data["name"], tuple(data["shape"]), dtype, data["grows"], data["batched"])


def _dtype(name: str) -> torch.dtype:
    value = getattr(torch, name, None)
    if not isinstance(value, torch.dtype):
        raise ArtifactError(f"graph.json names an unknown dtype {name!r}")
    return value


def _decode(value: Any, nodes: dict[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_decode(item, nodes) for item in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tuple":
        return tuple(_decode(item, nodes) for item in content)
    if kind == "slice":
        return slice(*(_decode(item, nodes) for item in content))
    return nodes[content] if kind == "node" else _decode_constant(kind, content)


def _decode_constant(kind: str, content: str) -> Any:
    if kind == "float":
        return float(content)
    if kind == "device":
        return torch.device("cpu" if content == "meta" else content)
    if kind == "dtype":
        return _dtype(content)
    found = getattr(torch, content, None)
    if kind in ("layout", "memory_format") and isinstance(found, torch.layout | torch.memory_format):
        return found
    raise ArtifactError(f"graph.json has an argument of unknown kind {kind!r}")
