"""Products that share their left side become one: x W_1, x W_2, .. = split(x [W_1 | W_2 | ..]).

Query, key and value, and gate and up, are read in one pass; in fewer bits x is quantised once. The joined weight is
made when it is written, so that no second copy of the weights lies in memory.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

from linearize.export.onnx_layout import put_constant

SMALLEST = 32  # columns


def merge_products(graph: ir.Graph, is_own: Callable[[ir.Value], bool]) -> int:
    """How many groups were merged. What `is_own` (a mixer's own weight, which is never quantised) stays by itself."""
    by_input: dict[int, list[ir.Node]] = {}
    for node in graph:
        if node.op_type == "MatMul" and not node.domain and _is_weight(node.inputs[1]) and not is_own(node.inputs[1]):  # type: ignore[arg-type]
            by_input.setdefault(id(node.inputs[0]), []).append(node)
    groups = [nodes for nodes in by_input.values() if len(nodes) > 1]
    for nodes in groups:
        _merge(graph, nodes)
    return len(groups)


def _is_weight(value: ir.Value | None) -> bool:
    if value is None or value.const_value is None or value.shape is None or len(value.shape) != 2:
        return False
    only_here = len(list(value.uses())) == 1
    return value.const_value.dtype == ir.DataType.FLOAT and only_here and int(value.shape[1]) >= SMALLEST  # type: ignore[arg-type]


def _merge(graph: ir.Graph, nodes: list[ir.Node]) -> None:
    first = nodes[0]
    x, shape = first.inputs[0], first.outputs[0].shape
    tensors = [node.inputs[1].const_value for node in nodes]  # type: ignore[union-attr]
    sizes = [tensor.numpy().shape for tensor in tensors]  # type: ignore[union-attr]
    widths, rows = [size[1] for size in sizes], sizes[0][0]
    total = sum(widths)
    name = " ".join(str(node.inputs[1].name) for node in nodes)  # type: ignore[union-attr]

    def joined() -> ir.TensorProtocol:
        parts = [tensor.numpy() for tensor in tensors]  # type: ignore[union-attr]
        return ir.tensor(np.concatenate(parts, axis=1), name=name)

    shape_of_all = ir.Shape([rows, total])
    lazy = ir.LazyTensor(joined, dtype=ir.DataType.FLOAT, shape=shape_of_all, name=name)
    weight = ir.Value(name=name, shape=shape_of_all, type=ir.TensorType(lazy.dtype), const_value=lazy)
    graph.register_initializer(weight)
    split_sizes = put_constant(graph, f"{name} widths", np.array(widths, dtype=np.int64))
    product = ir.node("MatMul", [x, weight])
    product.outputs[0].type = first.outputs[0].type
    product.outputs[0].shape = None if shape is None else ir.Shape([*shape[:-1], total])
    split = ir.node("Split", [product.outputs[0], split_sizes], attributes={"axis": -1}, num_outputs=len(nodes))
    graph.insert_before(first, [product, split])
    for node, part in zip(nodes, split.outputs, strict=True):
        old = node.outputs[0]
        part.shape, part.type, part_name = old.shape, old.type, old.name
        old.replace_all_uses_with(part, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        part.name = part_name
