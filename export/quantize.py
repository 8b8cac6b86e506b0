"""Weights of matrix products and the embedding in 8 or 4 bits; gates, feature maps, norms and states stay float32.

    int8, int4   MatMulNBits and GatherBlockQuantized (onnxruntime's own): faster than float32 natively, slower in wasm
    web          DynamicQuantizeLinear and MatMulInteger (standard): small files for wasm, no faster there
A table that is embedding and head at once is stored once for int8 and int4.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from linearize.errors import ExportError
from linearize.export.blocks import SMALL_BLOCK, block_size, quantize_columns, quantize_rows
from linearize.export.names import CONTRIB

SMALLEST = 32  # rows and columns; below that there is nothing to gain
INT8_ACTIVATIONS = 4  # accuracy_level: x is quantised by block as well, which is where the speed comes from


def quantize(model: ir.Model, kind: str, kept: Iterable[torch.Tensor]) -> int:
    """Rewrite the graph in place; how many weights were quantised. `kept` stay float32, wherever they appear.

    Raises:
        ExportError: there is no weight to quantise.
    """
    left = {digest(form) for tensor in kept for form in forms(tensor)}
    if kind == "web":
        undo_tied_heads(model.graph)
    done = sum(_rewrite(model.graph, node, kind, left) for node in list(model.graph))
    if not done:
        raise ExportError(f"nothing to quantise: no weight of at least {SMALLEST} x {SMALLEST} outside the mixers")
    if kind != "web":
        model.opset_imports[CONTRIB] = 1
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    return done


def forms(tensor: torch.Tensor) -> list[np.ndarray]:
    """A matrix and its transpose: the exporter stores either."""
    if tensor.ndim != 2:
        return []
    array = tensor.detach().numpy()
    return [np.ascontiguousarray(array), np.ascontiguousarray(array.T)]


def digest(array: np.ndarray) -> tuple[tuple[int, ...], bytes]:
    return array.shape, hashlib.sha256(np.ascontiguousarray(array).data).digest()


def _rewrite(graph: ir.Graph, node: ir.Node, kind: str, left: set[tuple[tuple[int, ...], bytes]]) -> int:
    place = {"MatMul": 1, "Gemm": 1, "Gather": 0}.get(node.op_type)
    weight = None if place is None or node.domain else _weight(node, place)
    if weight is None or min(weight.shape) < SMALLEST or digest(weight) in left:
        return 0
    if node.op_type == "Gather":
        return _embedding(graph, node, weight, kind)
    transposed = node.op_type == "Gemm"
    if transposed and (node.attributes.get_int("transB", 0) != 1 or len(node.inputs) > 2):
        return 0
    new = _web_product if kind == "web" else _block_product
    replace(graph, node, new(graph, node, weight if transposed else weight.T, kind))
    return 1


def _weight(node: ir.Node, place: int) -> np.ndarray | None:
    value = node.inputs[place] if len(node.inputs) > place else None
    if value is None or value.const_value is None or len(value.const_value.shape) != 2:
        return None
    if value.const_value.dtype != ir.DataType.FLOAT:
        return None
    return value.const_value.numpy()


def _block_product(graph: ir.Graph, node: ir.Node, rows: np.ndarray, kind: str) -> list[ir.Node]:
    """MatMulNBits of rows [N,K]."""
    bits = int(kind.removeprefix("int"))
    blocks = quantize_rows(rows, bits)
    base = f"{node.inputs[1].name}.{kind}"  # type: ignore[union-attr]
    inputs = [node.inputs[0], constant(graph, f"{base}.q", blocks.packed), constant(graph, f"{base}.s", blocks.scales)]
    if blocks.zeros is not None:
        inputs.append(constant(graph, f"{base}.z", blocks.zeros))
    attributes = {"K": rows.shape[1], "N": rows.shape[0], "bits": bits,
                  "block_size": block_size(rows.shape[1], bits), "accuracy_level": INT8_ACTIVATIONS}  # fmt: skip
    return [ir.node("MatMulNBits", inputs, attributes=attributes, domain=CONTRIB)]


def _web_product(graph: ir.Graph, node: ir.Node, rows: np.ndarray, kind: str) -> list[ir.Node]:
    """x and W in 8 bits, their product in int32, and both scales on it."""
    q, scales = quantize_columns(np.ascontiguousarray(rows.T))
    base = f"{node.inputs[1].name}.{kind}"  # type: ignore[union-attr]
    weight, scale = constant(graph, f"{base}.q", q), constant(graph, f"{base}.s", scales)
    middle = constant(graph, "quantized.zero", np.array(128, dtype=np.uint8))
    x = ir.node("DynamicQuantizeLinear", [node.inputs[0]], num_outputs=3)
    product = ir.node("MatMulInteger", [x.outputs[0], weight, x.outputs[2], middle])
    real = ir.node("Cast", [product.outputs[0]], attributes={"to": int(ir.DataType.FLOAT)})
    both = ir.node("Mul", [x.outputs[1], scale])
    return [x, product, real, both, ir.node("Mul", [real.outputs[0], both.outputs[0]])]


def _embedding(graph: ir.Graph, node: ir.Node, table: np.ndarray, kind: str) -> int:
    if node.attributes.get_int("axis", 0) != 0 or (kind != "web" and table.shape[1] % SMALL_BLOCK):
        return 0
    base = f"{node.inputs[0].name}.{kind}"  # type: ignore[union-attr]
    if kind == "web":
        q, scales = quantize_columns(np.ascontiguousarray(table.T))
        found = ir.node("Gather", [constant(graph, f"{base}.rows", np.ascontiguousarray(q.T)), node.inputs[1]])
        scale = ir.node("Gather", [constant(graph, f"{base}.scales", scales[:, None]), node.inputs[1]])
        middle = constant(graph, "quantized.zero_float", np.array(128, dtype=np.float32))
        real = ir.node("Cast", [found.outputs[0]], attributes={"to": int(ir.DataType.FLOAT)})
        centred = ir.node("Sub", [real.outputs[0], middle])
        replace(graph, node, [found, scale, real, centred, ir.node("Mul", [centred.outputs[0], scale.outputs[0]])])
        return 1
    bits = int(kind.removeprefix("int"))
    blocks = quantize_rows(table, bits)
    packed = blocks.packed.reshape(table.shape[0], -1)
    inputs = [constant(graph, f"{base}.rows", packed), node.inputs[1], constant(graph, f"{base}.s", blocks.scales)]
    if blocks.zeros is not None:
        inputs.append(constant(graph, f"{base}.z", blocks.zeros))
    block = block_size(table.shape[1], bits)
    attributes = {"bits": bits, "block_size": block, "gather_axis": 0, "quantize_axis": 1}
    replace(graph, node, [ir.node("GatherBlockQuantized", inputs, attributes=attributes, domain=CONTRIB)])
    return 1


def undo_tied_heads(graph: ir.Graph) -> None:
    """Gemm(x, table, transB=1) as MatMul: MatMulInteger has no transposition."""
    for node in list(graph):
        if node.op_type == "Gemm" and node.attributes.get_int("transB", 0) == 1 and len(node.inputs) == 2:
            weight = _weight(node, 1)
            if weight is not None:
                name = f"{node.inputs[1].name}.transposed"  # type: ignore[union-attr]
                turned = constant(graph, name, np.ascontiguousarray(weight.T))
                replace(graph, node, [ir.node("MatMul", [node.inputs[0], turned])])


def constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initialiser; the one of that name if there is one."""
    known = graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.tensor(np.ascontiguousarray(array), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def replace(graph: ir.Graph, old: ir.Node, new: Sequence[ir.Node]) -> None:
    """Put `new` in the place of `old`, whose output the last of them gives."""
    graph.insert_before(old, list(new))
    before, after = old.outputs[0], new[-1].outputs[0]
    after.shape, after.type = before.shape, before.type
    name = before.name
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    after.name = name
