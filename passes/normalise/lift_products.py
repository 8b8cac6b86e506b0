"""Products of rank 3 whose operands merge batch and heads become products of rank 4: one spelling of attention's two.

    bmm(reshape(a, [B*H, T, d]), reshape(b, [B*H, d, S])) -> reshape(matmul(a, b), [B*H, T, S]),   a [B,H,T,d]

and baddbmm the same with its scaled summand added. A side with no rank-4 tensor behind it (softmax run at rank 3, as
XGLM does) is reshaped to the other side's batch and heads. A key stored as permute(x, (0, 2, 3, 1)) is spelled as the
transpose of permute(x, (0, 2, 1, 3)), so that the key itself, [B,H,S,d], is a node.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import Editor
from linearize.rewriting.walk import is_op, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class LiftProducts:
    name: ClassVar[str] = "lift_products"
    stage: ClassVar[Stage] = Stage.NORMALISE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        if not any(is_op(node, aten.bmm, aten.baddbmm) or _stores_transposed(node) for node in program.graph.nodes):
            return program
        module = program.copy_graph()
        editor = Editor(module, self.name)
        for node in list(module.graph.nodes):
            with editor.at(node):
                new = _spelled(editor, node)
            if new is not None:
                editor.replace(node, new)
        return program.replace(module=editor.finish())


def _spelled(editor: Editor, node: fx.Node) -> fx.Node | None:
    """What replaces `node`, or None where it stays."""
    if _stores_transposed(node):
        key = _call(editor, node, aten.permute.default, node.args[0], [0, 2, 1, 3])
        return _call(editor, node, aten.transpose.int, key, -2, -1)
    if is_op(node, aten.bmm):
        return _lifted(editor, node, node.args[0], node.args[1])
    if is_op(node, aten.baddbmm):
        product = _lifted(editor, node, node.args[1], node.args[2])
        return product and _with_summand(editor, node, product)
    return None


def _stores_transposed(node: fx.Node) -> bool:
    return is_op(node, aten.permute) and list(node.args[1]) == [0, 2, 3, 1]  # type: ignore[arg-type]


def _lifted(editor: Editor, node: fx.Node, left: Any, right: Any) -> fx.Node | None:
    leading = _batch_and_heads(left) or _batch_and_heads(right)
    if leading is None:
        return None
    operands = [_rank4(editor, node, operand, leading) for operand in (left, right)]
    product = _call(editor, node, aten.matmul.default, *operands)
    return _call(editor, node, aten.reshape.default, product, _sizes(editor, node))


def _with_summand(editor: Editor, node: fx.Node, product: fx.Node) -> fx.Node:
    """baddbmm(input, a, b) = beta input + alpha a b."""
    beta, alpha = (node.kwargs.get(name, 1) for name in ("beta", "alpha"))
    if alpha != 1:
        product = _call(editor, node, aten.mul.Tensor, product, alpha)
    if beta == 0:
        return product
    summand: Any = node.args[0]
    if beta != 1:
        summand = _call(editor, node, aten.mul.Tensor, summand, beta)
    return _call(editor, node, aten.add.Tensor, summand, product)


def _batch_and_heads(node: Any) -> tuple[fx.Node, int] | None:
    """The rank-4 node behind an operand, and its number of heads."""
    found = _behind(node)
    if found is None:
        return None
    heads = shape_of(found[0])[1]
    return (found[0], int(heads)) if isinstance(heads, int) else None


def _behind(node: fx.Node) -> tuple[fx.Node, bool] | None:
    """(The rank-4 node that `node` [B*H, x, y] merges, whether its last two dims are swapped in `node`)."""
    swapped = False
    while is_op(node, aten.reshape, aten.transpose) and isinstance(node.args[0], fx.Node):
        if is_op(node, aten.transpose):
            if {dim % 3 for dim in node.args[1:3] if isinstance(dim, int)} != {1, 2} or len(shape_of(node)) != 3:
                return None
            swapped = not swapped
            node = node.args[0]
            continue
        before: Any = node.args[0]
        shape, source = shape_of(node), shape_of(before)
        node = before
        if len(source) == 4 and str(source[0] * source[1]) == str(shape[0]) and _same(source[2:], shape[1:]):
            return node, swapped
        if not (len(source) == 3 and _same(source, shape)):
            return None
    return None


def _same(left: tuple[Any, ...], right: tuple[Any, ...]) -> bool:
    return [str(size) for size in left] == [str(size) for size in right]


def _rank4(editor: Editor, node: fx.Node, operand: fx.Node, leading: tuple[fx.Node, int]) -> fx.Node:
    found = _behind(operand)
    if found is not None and _same(shape_of(found[0])[:2], shape_of(leading[0])[:2]):
        source, swapped = found
        return _call(editor, node, aten.transpose.int, source, -2, -1) if swapped else source
    rows, columns = (_size(editor, node, operand, dim) for dim in (1, 2))
    return _call(editor, node, aten.reshape.default, operand, [-1, leading[1], rows, columns])


def _sizes(editor: Editor, node: fx.Node) -> list[Any]:
    """Sizes of the rank-3 result, its merged first dim left to the reshape."""
    left, right = (node.args[1], node.args[2]) if is_op(node, aten.baddbmm) else (node.args[0], node.args[1])
    return [-1, _size(editor, node, left, 1), _size(editor, node, right, 2)]


def _size(editor: Editor, node: fx.Node, operand: Any, dim: int) -> Any:
    """A dim as a number, or as the node that reads it from the inputs: read from the operand it would keep it alive."""
    size = shape_of(operand)[dim]
    if isinstance(size, int):
        return size
    for known in editor.graph.find_nodes(op="call_function", target=aten.sym_size.int):
        if known < node and str(known.meta.get("val")) == str(size):
            return known
    read = editor.call(aten.sym_size.int, operand, dim)
    read.meta["val"] = size
    return read


def _call(editor: Editor, origin: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A new node with its own shape: matching reads shapes."""
    new = editor.call(target, *args, origin=origin)
    new.meta["val"] = target(*fx.node.map_arg(args, lambda arg: arg.meta["val"]))
    return new
