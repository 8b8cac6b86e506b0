"""RMS norms written out, seven nodes each, become one RMSNormalization, standard since opset 23; in the native flavour
onnxruntime's SkipSimplifiedLayerNormalization takes in the residual's sum before it.

Mul(w, Mul(x, Reciprocal(Sqrt(Add(ReduceMean(Pow(x, 2), -1), epsilon)))))
"""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from linearize.export.names import CONTRIB

CHAIN = ("ReduceMean", "Add", "Sqrt", "Reciprocal", "Mul", "Mul")


def fuse_norms(graph: ir.Graph) -> int:
    """How many there were."""
    return sum(_fuse(graph, node) for node in list(graph) if node.op_type == "Pow" and _number(node.inputs[1]) == 2)


def _fuse(graph: ir.Graph, power: ir.Node) -> int:
    chain = [power]
    for kind in CHAIN:
        user = _only_user(chain[-1])
        if user is None or user.op_type != kind:
            return 0
        chain.append(user)
    _, mean, add, _, reciprocal, scaled, weighted = chain
    x, epsilon = power.inputs[0], _other(add, mean)
    weight = _other(weighted, scaled)
    last_axis = mean.attributes.get_int("keepdims", 1) == 1 and _number(mean.inputs[1]) == -1
    if x is None or not last_axis or _other(scaled, reciprocal) is not x or _number(epsilon) is None:
        return 0
    if weight is None or weight.const_value is None or len(weight.const_value.shape) != 1:
        return 0
    attributes = {"axis": -1, "epsilon": _number(epsilon)}
    norm = ir.node("RMSNormalization", [x, weight], attributes=attributes)
    old, new = weighted.outputs[0], norm.outputs[0]
    new.shape, new.type, name = old.shape, old.type, old.name
    graph.insert_before(weighted, [norm])
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(weighted, safe=True)
    new.name = name
    return 1


def fuse_skips(graph: ir.Graph) -> int:
    """RMSNormalization(a + b) as one node that gives the sum too; how many there were."""
    return sum(_fuse_skip(graph, node) for node in list(graph) if node.op_type == "RMSNormalization")


def _fuse_skip(graph: ir.Graph, norm: ir.Node) -> int:
    total = norm.inputs[0]
    add = None if total is None else total.producer()
    if total is None or add is None or add.op_type != "Add" or total.shape is None or len(total.shape) != 3:
        return 0
    same = all(value is not None and value.shape == total.shape for value in add.inputs)
    if not same or norm.attributes.get_int("axis", -1) != -1 or total.is_graph_output():
        return 0
    attributes = {"epsilon": norm.attributes.get_float("epsilon", 1e-5)}
    fused = ir.node(
        "SkipSimplifiedLayerNormalization", [*add.inputs, norm.inputs[1]], attributes=attributes, domain=CONTRIB,
        num_outputs=4,
    )  # fmt: skip
    graph.insert_before(add, [fused])
    for old, new in ((norm.outputs[0], fused.outputs[0]), (total, fused.outputs[3])):
        new.shape, new.type, name = old.shape, old.type, old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(old.producer(), safe=True)  # type: ignore[arg-type]
        new.name = name
    for unused in fused.outputs[1:3]:
        unused.name = ""
    return 1


def _only_user(node: ir.Node) -> ir.Node | None:
    uses = list(node.outputs[0].uses())
    return uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None


def _other(node: ir.Node, producer: ir.Node) -> ir.Value | None:
    """The input of a commutative node that `producer` does not give."""
    return next((value for value in node.inputs if value is not producer.outputs[0]), None)


def _number(value: ir.Value | None) -> float | None:
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(np.asarray(value.const_value.numpy()).reshape(()))
