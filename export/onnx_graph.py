"""Edits of the translated ONNX graph: names, equal nodes once, tied weights once."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer

from linearize.export.names import CONTRIB
from linearize.export.onnx_layout import tidy_layout
from linearize.export.onnx_norms import fuse_norms, fuse_skips
from linearize.export.onnx_products import merge_products
from linearize.export.onnx_rotary import fuse_rotations

SMALL = 1 << 16  # bytes


def symbols_of(value: ir.Value) -> list[str]:
    """The names of a value's dynamic dims, in order."""
    assert value.shape is not None
    return [str(dim.value) for dim in value.shape if isinstance(dim, ir.SymbolicDim)]


def name_outputs(graph: ir.Graph, names: Sequence[str]) -> None:
    """Rename the outputs; one that is an input, a weight or another output gets an Identity of its own."""
    taken = {id(value) for value in graph.inputs}
    for index, name in enumerate(names):
        value = graph.outputs[index]
        if id(value) in taken or value.producer() is None:
            node = ir.node("Identity", [value])
            graph.append(node)
            node.outputs[0].shape, node.outputs[0].type = value.shape, value.type
            graph.outputs[index] = value = node.outputs[0]
        taken.add(id(value))
        value.name = name


def name_dims(graph: ir.Graph, symbols: dict[str, str]) -> None:
    """Replace the exporter's symbols (s53) in every shape: `s53 + 8` becomes `length + 8`."""
    pattern = re.compile("|".join(rf"\b{re.escape(symbol)}\b" for symbol in symbols))
    produced = [value for node in graph for value in node.outputs]
    for value in {id(v): v for v in (*graph.inputs, *produced)}.values():
        if value.shape is not None and not value.shape.frozen:
            value.shape = ir.Shape([_named(dim, pattern, symbols) for dim in value.shape])


def _named(dim: int | ir.SymbolicDim, pattern: re.Pattern[str], symbols: dict[str, str]) -> int | ir.SymbolicDim:
    if isinstance(dim, int) or dim.value is None:
        return dim
    return ir.SymbolicDim(pattern.sub(lambda match: symbols[match.group()], str(dim.value)))


def tidy(model: ir.Model, portable: bool, is_own: Callable[[ir.Value], bool]) -> None:
    """Fewer nodes with the same results, nothing twice, nothing unused, no stack traces. `is_own`: a mixer's weight."""
    graph = model.graph
    simplify(model)
    fuse_norms(graph)
    tidy_layout(graph)
    common.RemoveUnusedNodesPass()(model)
    fuse_rotations(graph)
    tidy_layout(graph)
    tie_heads(graph)
    merge_products(graph, is_own)
    if not portable:
        fuse_skips(graph)
        model.opset_imports[CONTRIB] = 1
    lay_out_weights(graph)
    common.DeduplicateInitializersPass(size_limit=SMALL)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    common.ClearMetadataAndDocStringPass()(model)


def simplify(model: ir.Model) -> None:
    """Constants folded, transpositions of weights among them. The exporter's own optimiser also tries every rewriting
    rule of onnxscript on every node: half of the time of an export, and nothing that onnxruntime does not do."""
    common.InlinePass()(model)
    optimizer.fold_constants(model, should_fold=lambda node: True if node.op_type == "Transpose" else None)
    common.RemoveUnusedNodesPass()(model)
    common.IdentityEliminationPass()(model)
    common.CommonSubexpressionEliminationPass()(model)  # knows equal Constant nodes, not equal initialisers
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.RemoveUnusedFunctionsPass()(model)
    common.RemoveUnusedOpsetsPass()(model)


def lay_out_weights(graph: ir.Graph) -> None:
    """Folded transpositions are views; small ones are made contiguous, as finding equal ones wants them. Large ones
    stay views until they are written, so that there is no second copy of the weights."""
    for value in graph.initializers.values():
        tensor = value.const_value
        if tensor is not None and tensor.nbytes <= SMALL and not tensor.numpy().flags.c_contiguous:
            value.const_value = ir.tensor(np.asarray(tensor.numpy(), order="C"), dtype=tensor.dtype, name=value.name)


def tie_heads(graph: ir.Graph) -> None:
    """x @ W^T, whose transpose is stored already as the table of a Gather, becomes a Gemm on that table.

    The exporter folds the transposition of a head into its weight, which would store a tied embedding twice.
    """
    tables = {id(node.inputs[0]): node.inputs[0] for node in graph if node.op_type == "Gather"}
    for node in list(graph):
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.const_value is None:
            continue
        for table in tables.values():
            if table is not None and _is_transpose(weight, table):
                _use_table(graph, node, table)
                break


def _is_transpose(weight: ir.Value, table: ir.Value) -> bool:
    left, right = weight.const_value, table.const_value
    if left is None or right is None or left.dtype != right.dtype or len(left.shape) != 2:
        return False
    if tuple(left.shape) != tuple(reversed(tuple(right.shape))):
        return False
    return bool(np.array_equal(left.numpy().T, right.numpy()))


def _use_table(graph: ir.Graph, matmul: ir.Node, table: ir.Value) -> None:
    """MatMul(x [B, T, D], [D, V]) -> Reshape, Gemm on table [V, D], Reshape back to [B, T, V]."""
    x, old = matmul.inputs[0], matmul.outputs[0]
    assert x is not None
    assert table.shape is not None
    rows, width = int(table.shape[0]), int(table.shape[1])  # type: ignore[arg-type]
    flat_shape = _integers(graph, f"{old.name}.flat", [-1, width])
    vocabulary = _integers(graph, f"{old.name}.vocabulary", [rows])
    flat = ir.node("Reshape", [x, flat_shape])
    product = ir.node("Gemm", [flat.outputs[0], table], attributes={"transB": 1})
    leading = ir.node("Shape", [x], attributes={"start": 0, "end": -1})
    shape = ir.node("Concat", [leading.outputs[0], vocabulary], attributes={"axis": 0})
    back = ir.node("Reshape", [product.outputs[0], shape.outputs[0]])
    new = back.outputs[0]
    new.shape, new.type, new.name = old.shape, old.type, old.name
    graph.insert_before(matmul, [flat, product, leading, shape, back])
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    graph.remove(matmul, safe=True)


def _integers(graph: ir.Graph, name: str, numbers: list[int]) -> ir.Value:
    tensor = ir.tensor(np.array(numbers, dtype=np.int64), name=name)
    value = ir.Value(name=name, shape=ir.Shape([len(numbers)]), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value
