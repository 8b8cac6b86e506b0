"""Nodes that only move numbers: transpositions that undo each other, reshapes that change nothing, zeros spread out.

    Transpose(Transpose(x))      one, or none               Reshape(Reshape(x))    one, or none
    Reshape to computed sizes    to constants, 0 standing for a dim that stays and -1 for the one that is left
    Where(c, x, Expand(0, ..))   Where(c, x, 0)             Unsqueeze(Squeeze(x))  x
    Where(x > 20, x, softplus)   Softplus(x)                Div(Neg(x), c)         Div(x, -c), and Mul(x, 1)  x
    Concat(x[:n], x[n:])         x, along any dim           Einsum(abcd,cde->abce) a MatMul by head between Transposes
    x[:]                         x
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx_ir as ir

HEADS_FIRST = [0, 2, 1, 3]
EVERYTHING = 2**63 - 1  # where a slice ends that has no end
BY_HEAD = "abcd,cde->abce"


def tidy_layout(graph: ir.Graph) -> None:
    """Until nothing changes."""
    for node in list(graph):
        if node.op_type == "Einsum":
            _by_matmul(graph, node)
    changed = True
    while changed:
        changed = any([RULES[node.op_type](graph, node) for node in list(graph) if node.op_type in RULES])


def take_place(graph: ir.Graph, old: ir.Node, value: ir.Value) -> None:
    """All uses of the node's first output read `value` instead; the node goes. Names of graph outputs stay."""
    before = old.outputs[0]
    name, is_output = before.name, before.is_graph_output()
    if is_output and (value.is_graph_input() or value.is_initializer() or value.is_graph_output()):
        return
    before.replace_all_uses_with(value, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    if is_output:
        value.name = name


def put(graph: ir.Graph, before: ir.Node, new: ir.Node, shape: ir.Shape | None, like: ir.Value) -> ir.Value:
    """Insert `new` ahead of `before`; its output has the type of `like`."""
    graph.insert_before(before, [new])
    new.outputs[0].shape, new.outputs[0].type = shape, like.type
    return new.outputs[0]


def integers(graph: ir.Graph, numbers: list[int]) -> ir.Value:
    """A constant int64 vector, one of each in a graph."""
    return put_constant(graph, "sizes." + "_".join(str(n) for n in numbers), np.array(numbers, dtype=np.int64))


def put_constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """An initialiser; the one of that name if there is one."""
    known = graph.initializers.get(name)
    if known is not None:
        return known
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    graph.register_initializer(value)
    return value


def producer_of(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def dims_of(value: ir.Value | None) -> list[int | str] | None:
    """Sizes and names of the dims; None unless all are known."""
    if value is None or value.shape is None:
        return None
    dims = [dim if isinstance(dim, int) else dim.value for dim in value.shape]
    return None if any(dim is None for dim in dims) else dims  # type: ignore[return-value]


def numbers_of(value: ir.Value | None) -> list[int] | None:
    """The integers of a constant."""
    if value is None or value.const_value is None:
        return None
    return [int(x) for x in np.asarray(value.const_value.numpy()).reshape(-1)]


def _transpose(graph: ir.Graph, node: ir.Node) -> bool:
    inner = producer_of(node.inputs[0])
    if inner is None or inner.op_type != "Transpose":
        return False
    first, then = inner.attributes["perm"].as_ints(), node.attributes["perm"].as_ints()
    both, x = [first[place] for place in then], inner.inputs[0]
    assert x is not None
    if both == list(range(len(both))):
        if node.outputs[0].is_graph_output():
            return False
        take_place(graph, node, x)
        return True
    new = ir.node("Transpose", [x], attributes={"perm": both})
    take_place(graph, node, put(graph, node, new, node.outputs[0].shape, node.outputs[0]))
    return True


def _reshape(graph: ir.Graph, node: ir.Node) -> bool:
    x, out = node.inputs[0], node.outputs[0]
    before, after = dims_of(x), dims_of(out)
    if x is None or before is None or after is None:
        return False
    if before == after and not out.is_graph_output():
        take_place(graph, node, x)
        return True
    inner = x.producer()
    source = x if inner is None or inner.op_type != "Reshape" else inner.inputs[0]
    sizes = _constant_sizes(dims_of(source), after)
    if source is None or sizes is None or (source is x and numbers_of(node.inputs[1]) is not None):
        return False
    new = ir.node("Reshape", [source, integers(graph, sizes)])
    take_place(graph, node, put(graph, node, new, out.shape, out))
    return True


def _constant_sizes(before: list[int | str] | None, after: list[int | str]) -> list[int] | None:
    """A Reshape's second input without computed sizes, if there is one."""
    if before is None or 0 in after:
        return None
    sizes: list[int] = []
    for place, dim in enumerate(after):
        stays = place < len(before) and before[place] == dim
        sizes.append(dim if isinstance(dim, int) else 0 if stays else -1)
    return sizes if sizes.count(-1) <= 1 else None


def _where(graph: ir.Graph, node: ir.Node) -> bool:
    """A branch that is one number spread over the other one's shape stays one number; a softplus spelled by PyTorch is
    one node, as onnxruntime's does not overflow."""
    if _is_softplus(node):
        plain = ir.node("Softplus", [node.inputs[1]])
        take_place(graph, node, put(graph, node, plain, node.outputs[0].shape, node.outputs[0]))
        return True
    for place, other in ((1, 2), (2, 1)):
        spread = producer_of(node.inputs[place])
        if spread is None or spread.op_type != "Expand" or spread.inputs[0] is None:
            continue
        single = spread.inputs[0].const_value
        same = dims_of(node.inputs[other]) == dims_of(node.outputs[0]) is not None
        if single is not None and single.size == 1 and same:
            node.replace_input_with(place, spread.inputs[0])
            return True
    return False


def _is_softplus(node: ir.Node) -> bool:
    """Where(x > t, x, Softplus(x) / 1), t at least 20, from where on both branches are equal in float32."""
    over, _, smooth = (producer_of(value) for value in node.inputs)
    x = node.inputs[1]
    if smooth is not None and smooth.op_type == "Div" and single(smooth.inputs[1]) == 1:
        smooth = producer_of(smooth.inputs[0])
    if over is None or smooth is None or over.op_type != "Greater" or smooth.op_type != "Softplus":
        return False
    threshold = single(over.inputs[1])
    return over.inputs[0] is x and smooth.inputs[0] is x and threshold is not None and threshold >= 20


def single(value: ir.Value | None) -> float | None:
    """The number that a value always is, through casts."""
    while value is not None and value.const_value is None:
        node = value.producer()
        if node is None or node.op_type not in ("Cast", "CastLike", "Identity"):
            return None
        value = node.inputs[0]
    if value is None or value.const_value is None or value.const_value.size != 1:
        return None
    return float(np.asarray(value.const_value.numpy()).reshape(()))


def _div(graph: ir.Graph, node: ir.Node) -> bool:
    negated, divisor = (producer_of(value) for value in node.inputs)
    number, constant = single(node.inputs[1]), node.inputs[1]
    if negated is None or negated.op_type != "Neg" or number is None or divisor is not None or constant is None:
        return False
    if constant.const_value is None:
        return False
    turned = put_constant(graph, f"{constant.name}.negated", -np.asarray(constant.const_value.numpy()))
    new = ir.node("Div", [negated.inputs[0], turned])
    take_place(graph, node, put(graph, node, new, node.outputs[0].shape, node.outputs[0]))
    return True


def _mul(graph: ir.Graph, node: ir.Node) -> bool:
    for x, one in (node.inputs, tuple(node.inputs)[::-1]):
        if x is not None and single(one) == 1 and one.const_value is not None and one.const_value.shape.rank() == 0:  # type: ignore[union-attr]
            take_place(graph, node, x)
            return not node.outputs[0].is_graph_output()
    return False


def _unsqueeze(graph: ir.Graph, node: ir.Node) -> bool:
    inner = producer_of(node.inputs[0])
    if inner is None or inner.op_type != "Squeeze" or inner.inputs[0] is None or node.outputs[0].is_graph_output():
        return False
    x = inner.inputs[0]
    if dims_of(x) is None or dims_of(x) != dims_of(node.outputs[0]):
        return False
    take_place(graph, node, x)
    return True


def _concat(graph: ir.Graph, node: ir.Node) -> bool:
    """Of a tensor's two parts, in order."""
    cuts = [producer_of(value) for value in node.inputs]
    if len(cuts) != 2 or any(cut is None or cut.op_type != "Slice" for cut in cuts):
        return False
    low, high = (cut for cut in cuts if cut is not None)
    x, dims = low.inputs[0], dims_of(low.inputs[0])
    if x is None or x is not high.inputs[0] or dims is None:
        return False
    axis = node.attributes.get_int("axis", 0) % len(dims)
    size = dims[axis]
    bounds = [_bounds(cut, axis, len(dims), size) for cut in (low, high)] if isinstance(size, int) else [None]
    if None in bounds or bounds[0][0] != 0 or bounds[1][1] != size or bounds[0][1] != bounds[1][0]:  # type: ignore[index]
        return False
    take_place(graph, node, x)
    return True


def _bounds(cut: ir.Node, axis: int, rank: int, size: int) -> tuple[int, int] | None:
    """First and stop of a slice of step 1 along one axis."""
    numbers = [numbers_of(value) for value in cut.inputs[1:]]
    if len(numbers) < 3 or any(found is None or len(found) != 1 for found in numbers):
        return None
    start, stop, along, *step = (found[0] for found in numbers if found is not None)
    if along % rank != axis or step not in ([], [1]):
        return None
    return (start + size if start < 0 else start, min(stop + size if stop < 0 else stop, size))


def _slice(graph: ir.Graph, node: ir.Node) -> bool:
    """From the first to the last."""
    x = node.inputs[0]
    start, stop, *rest = (numbers_of(value) for value in node.inputs[1:])
    whole = start == [0] and stop == [EVERYTHING] and (len(rest) < 2 or rest[1] == [1])
    if x is None or not whole or node.outputs[0].is_graph_output():
        return False
    take_place(graph, node, x)
    return True


def _by_matmul(graph: ir.Graph, node: ir.Node) -> None:
    """x [B,T,heads,d] with W [heads,d,f], a head at a time."""
    x, weight, out = node.inputs[0], node.inputs[1], node.outputs[0]
    if canonical(node.attributes.get_string("equation", "")) != BY_HEAD or x is None:
        return
    dims, new_dims = x.shape, out.shape
    if dims is None or new_dims is None:
        return
    turned = ir.Shape([dims[place] for place in HEADS_FIRST])
    first = put(graph, node, ir.node("Transpose", [x], attributes={"perm": HEADS_FIRST}), turned, x)
    product_shape = ir.Shape([new_dims[place] for place in HEADS_FIRST])
    product = put(graph, node, ir.node("MatMul", [first, weight]), product_shape, x)
    back = ir.node("Transpose", [product], attributes={"perm": HEADS_FIRST})
    take_place(graph, node, put(graph, node, back, new_dims, x))


def canonical(equation: str) -> str:
    """With the letters in order of appearance from a on."""
    letters: dict[str, str] = {}
    return "".join(
        letters.setdefault(c, chr(ord("a") + len(letters))) if c.isalpha() else c
        for c in equation.replace(" ", "")
    )


RULES: dict[str, Callable[[ir.Graph, ir.Node], bool]] = {
    "Concat": _concat,
    "Div": _div,
    "Mul": _mul,
    "Transpose": _transpose,
    "Unsqueeze": _unsqueeze,
    "Reshape": _reshape,
    "Slice": _slice,
    "Where": _where,
}
