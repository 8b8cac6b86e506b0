"""Products of attention become `matmul` of rank 4 and SDPA calls take rank 4: one spelling of attention's two products.

    bmm(reshape(a, [B*H, T, d]), reshape(b, [B*H, d, S])) -> reshape(matmul(a, b), [B*H, T, S]),   a [B,H,T,d]
    matmul(a [B,G,R,T,d], b [B,G,1,d,S])                  -> reshape(matmul(a', b'), [B,G,R,T,S]), a' [B,G*R,T,d]
    sdpa(q [B,T,d], k, v)                                 -> squeeze(sdpa(unsqueeze(q, 1), ..), 1)
    matmul(transpose(v), transpose(softmax))              -> transpose(matmul(softmax, v))

baddbmm is the first with its scaled summand added. A side with no rank-4 tensor behind it (softmax run at rank 3, as
XGLM does) is reshaped to the other side's batch and heads; where neither has one (nn.MultiheadAttention), the number of
heads is the first dim over the batch, and which of the two runs faster is found by value. A key stored as
permute(x, (0, 2, 3, 1)) is spelled as the transpose of permute(x, (0, 2, 1, 3)), so that the key itself, [B,H,S,d], is
a node.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from linearize.passes.normalise.spell_einsums import call as _call
from linearize.pipeline import Keeps, Stage
from linearize.program import TOKENS, Program
from linearize.rewriting.editor import Editor
from linearize.rewriting.probes import plain_inputs, random_like
from linearize.rewriting.walk import evaluate, is_op, shape_of, swaps_last_two

aten = torch.ops.aten
SHAPING = (aten.reshape, aten.transpose, aten.permute, aten.unsqueeze, aten.squeeze, aten._to_copy, aten.clone)


@dataclass(frozen=True)
class Leading:
    """How the first dim of a rank-3 operand merges batch and heads; `heads_first`: as h * B + b, not b * H + h."""

    heads: int
    heads_first: bool = False


@dataclass(frozen=True)
class LiftProducts:
    name: ClassVar[str] = "lift_products"
    stage: ClassVar[Stage] = Stage.NORMALISE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        if not any(_concerns(node) for node in program.graph.nodes):
            return program
        module = program.copy_graph()
        editor = Editor(module, self.name)
        lifter = _Lifter(editor, program.replace(module=module))
        for node in list(module.graph.nodes):
            if not _concerns(node):
                continue
            with editor.at(node):
                new = lifter.spelled(node)
            if new is not None:
                editor.replace(node, new)
        return program.replace(module=editor.finish())


def _concerns(node: fx.Node) -> bool:
    return is_op(node, aten.bmm, aten.baddbmm, aten.matmul, aten.scaled_dot_product_attention) or _stores_transposed(
        node
    )


def _stores_transposed(node: fx.Node) -> bool:
    return is_op(node, aten.permute) and list(node.args[1]) == [0, 2, 3, 1]  # type: ignore[arg-type]


class _Lifter:
    def __init__(self, editor: Editor, program: Program) -> None:
        self.editor, self.program = editor, program
        tokens = next(node for node in program.placeholders() if node.target == TOKENS)
        self.batch = shape_of(tokens)[0]
        self.sizes = [node for node in editor.graph.nodes if is_op(node, aten.sym_size)]

    def spelled(self, node: fx.Node) -> fx.Node | None:
        """What replaces `node`, or None where it stays."""
        if _stores_transposed(node):
            key = _call(self.editor, node, aten.permute.default, node.args[0], [0, 2, 1, 3])
            return _call(self.editor, node, aten.transpose.int, key, -2, -1)
        if is_op(node, aten.scaled_dot_product_attention):
            return self._sdpa(node)
        if is_op(node, aten.baddbmm):
            product = self._lifted(node, node.args[1], node.args[2])
            return product and _with_summand(self.editor, node, product)
        left, right = list[Any](node.args[:2])
        if is_op(node, aten.matmul) and _from_softmax(right) and not _from_softmax(left):
            return self._turned(node, left, right)
        ranks = {len(shape_of(left)), len(shape_of(right))}
        if ranks == {5}:
            return self._grouped(node, left, right)
        return self._lifted(node, left, right) if ranks == {3} else None

    def _sdpa(self, node: fx.Node) -> fx.Node | None:
        """One head without a dim of its own; a mask [B, T, S] gets one too."""
        heads: list[Any] = list(node.args[:3])
        if any(len(shape_of(arg)) != 3 for arg in heads):
            return None
        mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
        operands = [_call(self.editor, node, aten.unsqueeze.default, arg, 1) for arg in node.args[:3]]
        rest, kwargs = list(node.args[3:]), dict(node.kwargs)
        if isinstance(mask, fx.Node) and len(shape_of(mask)) == 3:
            mask = _call(self.editor, node, aten.unsqueeze.default, mask, 1)
            rest, kwargs = ([mask, *rest[1:]], kwargs) if rest else (rest, {**kwargs, "attn_mask": mask})
        lifted = self.editor.call(node.target, *operands, *rest, origin=node, **kwargs)  # type: ignore[arg-type]
        lifted.meta["val"] = node.meta["val"].unsqueeze(1)
        return _call(self.editor, node, aten.squeeze.dim, lifted, 1)

    def _turned(self, node: fx.Node, left: Any, right: Any) -> fx.Node | None:
        if not len(shape_of(left)) == len(shape_of(right)) >= 3:
            return None
        turned = [self._transposed(node, operand) for operand in (right, left)]
        product = _call(self.editor, node, aten.matmul.default, *turned)
        return _call(self.editor, node, aten.transpose.int, product, -2, -1)

    def _transposed(self, node: fx.Node, operand: fx.Node) -> fx.Node:
        if swaps_last_two(operand):
            return operand.args[0]  # type: ignore[return-value]
        return _call(self.editor, node, aten.transpose.int, operand, -2, -1)

    def _grouped(self, node: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node | None:
        """[B, G, R, ..] with one of the two heads' dims shared by a side."""
        groups = [max(shape_of(left)[i], shape_of(right)[i]) for i in (1, 2) if _numbers(left, right, i)]
        if len(groups) != 2 or str(shape_of(left)[0]) != str(shape_of(right)[0]):
            return None
        operands = [self._ungrouped(node, operand, groups) for operand in (left, right)]
        product = _call(self.editor, node, aten.matmul.default, *operands)
        sizes = [-1, *groups, self._size(node, left, 3), self._size(node, right, 4)]
        return _call(self.editor, node, aten.reshape.default, product, sizes)

    def _ungrouped(self, node: fx.Node, operand: fx.Node, groups: list[int]) -> fx.Node:
        """[B, G, 1 or R, x, y] -> [B, G*R, x, y], under its transpose where it is one, so that a key stays a node."""
        if swaps_last_two(operand):
            inner = self._ungrouped(node, operand.args[0], groups)  # type: ignore[arg-type]
            return _call(self.editor, node, aten.transpose.int, inner, -2, -1)
        if list(shape_of(operand)[1:3]) != groups:
            operand = _call(self.editor, node, aten.expand.default, operand, [-1, *groups, -1, -1])
        sizes = [-1, groups[0] * groups[1], self._size(node, operand, 3), self._size(node, operand, 4)]
        return _call(self.editor, node, aten.reshape.default, operand, sizes)

    def _lifted(self, node: fx.Node, left: Any, right: Any) -> fx.Node | None:
        known = _batch_and_heads(left) or _batch_and_heads(right)
        leading = Leading(known) if known else self._merged(left) or self._merged(right)
        if leading is None:
            return None
        operands = [self._rank4(node, operand, leading) for operand in (left, right)]
        product = _call(self.editor, node, aten.matmul.default, *operands)
        if leading.heads_first:
            product = _call(self.editor, node, aten.transpose.int, product, 0, 1)
        sizes = [-1, self._size(node, left, 1), self._size(node, right, 2)]
        return _call(self.editor, node, aten.reshape.default, product, sizes)

    def _rank4(self, node: fx.Node, operand: fx.Node, leading: Leading) -> fx.Node:
        found = _behind(operand)
        if found is not None and not leading.heads_first and shape_of(found[0])[1] == leading.heads:
            source, swapped = found
            return _call(self.editor, node, aten.transpose.int, source, -2, -1) if swapped else source
        if swaps_last_two(operand):
            inner = self._rank4(node, operand.args[0], leading)  # type: ignore[arg-type]
            return _call(self.editor, node, aten.transpose.int, inner, -2, -1)
        rows, columns = (self._size(node, operand, dim) for dim in (1, 2))
        if leading.heads_first:
            apart = _call(self.editor, node, aten.reshape.default, operand, [leading.heads, -1, rows, columns])
            return _call(self.editor, node, aten.transpose.int, apart, 0, 1)
        return _call(self.editor, node, aten.reshape.default, operand, [-1, leading.heads, rows, columns])

    def _merged(self, operand: Any) -> Leading | None:
        """Heads of an operand whose first dim is a multiple of the batch, if the order of the two can be told."""
        if isinstance(self.batch, int) or isinstance(shape_of(operand)[0], int):
            return None
        quotient = shape_of(operand)[0].node.expr / self.batch.node.expr
        if not quotient.is_Integer or int(quotient) < 1:
            return None
        heads = int(quotient)
        if heads == 1:
            return Leading(1)
        try:
            moved = self._rows_of_batch(operand, heads)
        except (RuntimeError, ValueError, KeyError, TypeError):
            return None
        if moved is None:
            return None
        place = torch.arange(len(moved))
        batch_first, heads_first = place // heads == 1, place % (len(moved) // heads) == 1
        if torch.equal(moved, batch_first):
            return Leading(heads)
        return Leading(heads, heads_first=True) if torch.equal(moved, heads_first) else None

    def _rows_of_batch(self, operand: fx.Node, heads: int) -> torch.Tensor | None:
        """Bool [B*H]: the rows of `operand` that change when batch row 1 of what it is made of does."""
        batch, length = 3 if heads != 3 else 2, 5
        given = plain_inputs(self.program, batch, length)
        moved = dict(given)
        generator = torch.Generator().manual_seed(0)
        for source, dim in self._with_batch(operand):
            value = random_like(self.program, source, batch, length, generator)
            given[source], moved[source] = value, value.index_fill(dim, torch.tensor([1]), 3.0)
        values = [evaluate(self.program.module, [operand], inputs)[0] for inputs in (given, moved)]
        changed: torch.Tensor = (values[0] != values[1]).flatten(1).any(1)
        return None if changed.is_meta else changed

    def _with_batch(self, operand: fx.Node) -> Iterator[tuple[fx.Node, int]]:
        """The nearest tensors behind `operand` that have a dim of the batch alone, and which dim."""
        seen, stack = set(), list(operand.all_input_nodes)
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            seen.add(node)
            dims = [i for i, size in enumerate(shape_of(node)) if str(size) == str(self.batch)]
            if dims and node.op == "call_function" and node.meta["val"].is_floating_point():
                yield node, dims[0]
            else:
                stack.extend(node.all_input_nodes)

    def _size(self, node: fx.Node, operand: Any, dim: int) -> Any:
        """A dim as a number, or as the node that reads it from the inputs: read from the operand it would keep it
        alive."""
        size = shape_of(operand)[dim]
        if isinstance(size, int):
            return size
        for known in self.sizes:
            if known < node and str(known.meta.get("val")) == str(size):
                return known
        read = self.editor.call(aten.sym_size.int, operand, dim)
        read.meta["val"] = size
        return read


def _from_softmax(node: Any) -> bool:
    """Whether `node` is attention weights, reshaped, transposed or cast."""
    while is_op(node, *SHAPING):
        node = node.args[0]
    return is_op(node, aten.softmax, aten._softmax, aten._safe_softmax)


def _numbers(left: fx.Node, right: fx.Node, dim: int) -> bool:
    sizes = shape_of(left)[dim], shape_of(right)[dim]
    return all(isinstance(size, int) for size in sizes) and (sizes[0] == sizes[1] or 1 in sizes)


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


def _batch_and_heads(node: Any) -> int | None:
    """The number of heads of the rank-4 node behind an operand."""
    found = _behind(node)
    if found is None:
        return None
    heads = shape_of(found[0])[1]
    return int(heads) if isinstance(heads, int) else None


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
