"""A query or key computed again as if every token stood at position 0, where a rotation is the identity.

Factors that come from positions are 1 (a cosine, a complex unit) or 0 (a sine) there: products with a 1 are their other
factor, products with a 0 vanish, and what neither meets is the source's own node. What is left is the path around the
rotation: transposes, cuts and joins.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from linearize.passes.match.region import Flow
from linearize.rewriting.editor import Editor
from linearize.rewriting.probes import plain_inputs
from linearize.rewriting.walk import evaluate, is_op, shape_of

aten = torch.ops.aten
ZERO = object()  # a tensor of zeros
LENGTH = 3
# Operators that give zeros of zeros.
OF_ZEROS = (
    aten.neg, aten.slice, aten.reshape, aten.view, aten.transpose, aten.permute, aten.unsqueeze, aten.squeeze,
    aten.expand, aten._to_copy, aten.clone, aten.select, aten.mul, aten.stack, aten.cat, aten.flatten, aten.div,
)  # fmt: skip


class NotARotation(Exception):
    """Positions enter in another way than by factors that are 0 or 1 at position 0."""


class AtPositionZero:
    def __init__(self, editor: Editor, flow: Flow, node: fx.Node) -> None:
        self.editor, self.flow, self.node = editor, flow, node
        self.behind = node.next  # new nodes stand before it, in the order in which they are made
        self.made: dict[fx.Node, Any] = {}

    def value(self) -> fx.Node | None:
        """A node of the same shape, new ones standing right behind `node`; None where it cannot be made."""
        try:
            result = self._of(self.node)
        except (NotARotation, RuntimeError, ValueError, KeyError):
            return None
        return result if isinstance(result, fx.Node) and result is not self.node else None

    def _of(self, node: fx.Node) -> Any:
        if node not in self.made:
            self.made[node] = self._fresh(node)
        return self.made[node]

    def _fresh(self, node: fx.Node) -> Any:
        if node not in self.flow.activations or node in self.flow.products:
            return node
        positional = [arg for arg in node.all_input_nodes if arg in self.flow.positional and _is_tensor(arg)]
        if positional:
            return self._product(node)
        inputs = {arg: self._of(arg) for arg in node.all_input_nodes}
        if all(new is arg for arg, new in inputs.items()):
            return node
        if any(new is ZERO for new in inputs.values()):
            return self._with_zeros(node, inputs)
        if is_op(node, aten.view_as_real) and is_op(inputs[node.args[0]], aten.view_as_complex):  # type: ignore[index]
            return inputs[node.args[0]].args[0]  # type: ignore[index]
        args = fx.node.map_arg(node.args, lambda arg: inputs[arg])
        with self.editor.at(self.behind):
            new = self.editor.call(node.target, *args, origin=node, **dict(node.kwargs))  # type: ignore[arg-type]
        return new

    def _product(self, node: fx.Node) -> Any:
        """x times a factor of positions."""
        if not is_op(node, aten.mul) or node.kwargs:
            raise NotARotation
        left, right = node.args
        x, factor = (left, right) if right in self.flow.positional else (right, left)
        if x not in self.flow.activations:
            raise NotARotation
        first = self._factor(factor)  # type: ignore[arg-type]
        if first == 0:
            return ZERO
        source = self._of(x)  # type: ignore[arg-type]
        same = isinstance(source, fx.Node) and [*map(str, shape_of(source))] == [*map(str, shape_of(node))]
        if source is ZERO or (same and source.meta["val"].dtype == node.meta["val"].dtype):
            return source
        raise NotARotation

    def _factor(self, factor: fx.Node) -> complex:
        """The factor at position 0, the same everywhere."""
        program = self.flow.program
        (value,) = evaluate(program.module, [factor], plain_inputs(program, 1, LENGTH))
        tokens = next(iter(program.placeholders()))
        length = str(shape_of(tokens)[1])
        for dim, size in enumerate(shape_of(factor)):
            if str(size) == length:
                value = value.narrow(dim, 0, 1)
        if value.is_meta or value.numel() == 0 or not bool((value == value.flatten()[0]).all()):
            raise NotARotation
        number = complex(value.flatten()[0].item())
        if abs(number.imag) > 1e-6:
            raise NotARotation
        return number

    def _with_zeros(self, node: fx.Node, inputs: dict[fx.Node, Any]) -> Any:
        if is_op(node, aten.add, aten.sub) and len(node.args) == 2 and not node.kwargs:
            operands: list[Any] = list(node.args)
            left, right = (inputs.get(arg, arg) for arg in operands)
            if right is ZERO:
                return left
            if left is ZERO and is_op(node, aten.add):
                return right
            raise NotARotation
        if all(new is ZERO for new in inputs.values()) and is_op(node, *OF_ZEROS):
            return ZERO
        raise NotARotation


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)
