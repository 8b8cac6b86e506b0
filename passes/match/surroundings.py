"""What stands around a site beyond its projections: positions of the whole model, gates and norms after the core."""

from __future__ import annotations

import torch
from torch import fx

from linearize.passes.match.region import Flow
from linearize.rewriting.walk import attribute, cone, is_op, shape_of

aten = torch.ops.aten
NORMS = (aten.rsqrt, aten.rms_norm, aten.layer_norm, aten._fused_rms_norm, aten.native_layer_norm, aten.group_norm)


def absolute_positions(flow: Flow) -> str:
    """`learned` or `fixed` where a tensor of positions [.., T, D] is added to the activations, else ''."""
    for node in flow.program.graph.nodes:
        if node in flow.activations and is_op(node, aten.add):
            for arg in node.all_input_nodes:
                if arg in flow.positional and _is_vector_by_token(arg, node):
                    return "learned" if _has_parameter(flow, arg) else "fixed"
    return ""


def _is_vector_by_token(table: fx.Node, total: fx.Node) -> bool:
    shape, whole = shape_of(table), shape_of(total)
    floating = isinstance(table.meta.get("val"), torch.Tensor) and table.meta["val"].is_floating_point()
    return floating and len(shape) >= 2 and len(whole) == 3 and shape[-1] == whole[-1]


def _has_parameter(flow: Flow, node: fx.Node) -> bool:
    tensors = [attribute(flow.program.module, str(item.target)) for item in cone([node]) if item.op == "get_attr"]
    return any(isinstance(tensor, torch.nn.Parameter) for tensor in tensors)


def after_core(flow: Flow, core: fx.Node, output: fx.Node | None) -> list[str]:
    """`output-gate` and `output-norm`: what the core's output meets before its projection."""
    if output is None:
        return []
    between = _path(core, output)
    extras = []
    if any(is_op(node, aten.mul) and _other_activation(flow, node, between | {core}) for node in between - {output}):
        extras.append("output-gate")
    if any(is_op(node, *NORMS) for node in between):
        extras.append("output-norm")
    return extras


def is_parallel(flow: Flow, hidden: fx.Node | None, projections: list[fx.Node], output: fx.Node | None) -> bool:
    """Whether products that do not serve this attention read what q, k and v are projected from."""
    sources = {arg for node in projections for arg in node.all_input_nodes if arg in flow.activations}
    if hidden is None or output is None or len(sources) != 1:
        return False
    (source,) = sources
    serving = cone([output], stop=[source])
    return any(user in flow.products and user not in serving for user in source.users)


def _path(start: fx.Node, end: fx.Node) -> set[fx.Node]:
    """Nodes on the way from `start` to `end`, `start` left out."""
    behind, on_path = cone([end], stop=[start]), {start}
    for node in sorted(behind):
        if any(arg in on_path for arg in node.all_input_nodes):
            on_path.add(node)
    return on_path - {start}


def _other_activation(flow: Flow, node: fx.Node, between: set[fx.Node]) -> bool:
    inputs = [arg for arg in node.all_input_nodes if arg in flow.activations]
    return len(inputs) == 2 and any(arg not in between for arg in inputs)
