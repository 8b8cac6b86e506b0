"""A rotation written out, seven nodes, becomes one RotaryEmbedding, standard since opset 23.

    Add(Mul(x, c), Mul(Concat(Neg(x[.., h:]), x[.., :h]), s)),  x [B,H,T,2h],  c, s cos, sin of Concat(f, f) [B,1,T,2h]

It reads the first half of c and s, computed once for all layers, so no table bounds the context. Where x is a
transposition of [B,T,H,2h], the node takes [B,T,H 2h], and the transposition follows it.
"""

from __future__ import annotations

import onnx_ir as ir

from linearize.export.onnx_layout import HEADS_FIRST, dims_of, integers, numbers_of, put, take_place


def fuse_rotations(graph: ir.Graph) -> int:
    """How many there were."""
    halves: dict[int, ir.Value] = {}
    return sum(_fuse(graph, node, halves) for node in list(graph) if node.op_type == "Add")


def _fuse(graph: ir.Graph, add: ir.Node, halves: dict[int, ir.Value]) -> int:
    products = [_producer(value, "Mul") for value in add.inputs]
    for straight, turned in (products, products[::-1]):
        if straight is None or turned is None:
            continue
        for x, cos in (straight.inputs, tuple(straight.inputs)[::-1]):
            for swapped, sin in (turned.inputs, tuple(turned.inputs)[::-1]):
                if x is not None and _is_swap(x, swapped) and _fits(x, cos, sin):
                    table = [_half(graph, value, halves) for value in (cos, sin)]
                    if None not in table:
                        _write(graph, add, x, table)
                        return 1
    return 0


def _producer(value: ir.Value | None, kind: str) -> ir.Node | None:
    node = None if value is None else value.producer()
    return node if node is not None and node.op_type == kind else None


def _is_swap(x: ir.Value, swapped: ir.Value | None) -> bool:
    """Concat(-x[.., h:], x[.., :h]) along the last dim."""
    joined = _producer(swapped, "Concat")
    dims = dims_of(x)
    if joined is None or len(joined.inputs) != 2 or dims is None or len(dims) != 4 or not isinstance(dims[3], int):
        return False
    negated = _producer(joined.inputs[0], "Neg")
    half = dims[3] // 2
    last = joined.attributes.get_int("axis", 0) in (-1, 3)
    return (
        negated is not None and last and dims[3] % 2 == 0
        and _is_slice(negated.inputs[0], x, half, dims[3]) and _is_slice(joined.inputs[1], x, 0, half)
    )  # fmt: skip


def _is_slice(value: ir.Value | None, x: ir.Value, start: int, stop: int) -> bool:
    node = _producer(value, "Slice")
    if node is None or node.inputs[0] is not x or len(node.inputs) < 4:
        return False
    found = [numbers_of(each) for each in node.inputs[1:]]
    if any(numbers is None or len(numbers) != 1 for numbers in found):
        return False
    begin, end, axis = (numbers[0] for numbers in found[:3])  # type: ignore[index]
    step = found[3][0] if len(found) > 3 and found[3] else 1
    return begin == start and (end == stop or (end > stop == 2 * start)) and axis in (-1, 3) and step == 1


def _fits(x: ir.Value, cos: ir.Value | None, sin: ir.Value | None) -> bool:
    """Both [B,1,T,2h] for x [B,H,T,2h]."""
    dims = dims_of(x)
    return dims is not None and dims_of(cos) == dims_of(sin) == [dims[0], 1, dims[2], dims[3]]


def _half(graph: ir.Graph, value: ir.Value | None, known: dict[int, ir.Value]) -> ir.Value | None:
    """The first half [B,T,h] of Unsqueeze(.. Cos(Concat(f, f)) .., 1); None if it is something else."""
    wide = _producer(value, "Unsqueeze")
    if wide is None or numbers_of(wide.inputs[1]) != [1] or wide.inputs[0] is None:
        return None
    table = wide.inputs[0]
    if id(table) in known:
        return known[id(table)]
    dims, producer = dims_of(table), table.producer()
    if dims is None or producer is None or not _repeats(table):
        return None
    half = int(dims[2]) // 2
    bounds = [integers(graph, [number]) for number in (0, half, -1)]
    node = ir.node("Slice", [table, *bounds])
    graph.insert_after(producer, [node])
    node.outputs[0].shape, node.outputs[0].type = ir.Shape([*table.shape[:2], half]), table.type  # type: ignore[index]
    known[id(table)] = node.outputs[0]
    return node.outputs[0]


def _repeats(value: ir.Value | None) -> bool:
    """Whether both halves are equal: a function of each number of Concat(f, f)."""
    node = None if value is None else value.producer()
    if node is None:
        return False
    if node.op_type == "Concat":
        return len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]
    if node.op_type in ("Cos", "Sin", "Cast", "Identity"):
        return _repeats(node.inputs[0])
    if node.op_type == "Mul":
        scalars = [each for each in node.inputs if each is not None and each.const_value is not None]
        others = [each for each in node.inputs if each not in scalars]
        return len(scalars) == 1 and scalars[0].const_value.size == 1 and _repeats(others[0])  # type: ignore[union-attr]
    return False


def _write(graph: ir.Graph, add: ir.Node, x: ir.Value, table: list[ir.Value | None]) -> None:
    out, dims = add.outputs[0], dims_of(x)
    source = _producer(x, "Transpose")
    if source is None or list(source.attributes["perm"].as_ints()) != HEADS_FIRST or dims is None:
        node = ir.node("RotaryEmbedding", [x, *table])
        take_place(graph, add, put(graph, add, node, out.shape, out))
        return
    heads, dim, inner = int(dims[1]), int(dims[3]), source.inputs[0]
    assert inner is not None
    assert inner.shape is not None
    flat = ir.Shape([*inner.shape[:2], heads * dim])
    packed = put(graph, add, ir.node("Reshape", [inner, integers(graph, [0, 0, heads * dim])]), flat, out)
    node = ir.node("RotaryEmbedding", [packed, *table], attributes={"num_heads": heads})
    rotated = put(graph, add, node, flat, out)
    split = ir.node("Reshape", [rotated, integers(graph, [0, 0, heads, dim])])
    by_head = put(graph, add, split, inner.shape, out)
    back = ir.node("Transpose", [by_head], attributes={"perm": HEADS_FIRST})
    take_place(graph, add, put(graph, add, back, out.shape, out))
