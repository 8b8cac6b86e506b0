"""Masks of long windows without their square: values of [.., T, T] tensors at a few chosen rows only.

A mask is made of small tensors ([T], [T, 1], [B, 1, 1, T]) that meet in operators which work element by element. The
small ones are computed whole, the square ones at the chosen query rows, so that a window of 131072 is read in a few
megabytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from linearize.rewriting.walk import cone, is_op, ordered, parameter, place_of, shape_of

aten = torch.ops.aten

LARGEST_WHOLE = 1 << 26
# Work element by element, though torch does not say so.
UNTAGGED = (
    aten.__and__, aten.__or__, aten.__xor__, aten.where, aten.masked_fill, aten.floor_divide, aten.rsub,
    aten.logical_and, aten.logical_or, aten.logical_not,
)  # fmt: skip
FACTORIES = (aten.ones, aten.zeros, aten.full, aten.empty)
NEW_FACTORIES = (aten.new_ones, aten.new_zeros, aten.new_full)
LIKE = (aten.ones_like, aten.zeros_like, aten.full_like, aten.clone, aten._to_copy, aten.to, aten.alias)
VIEWS = (aten.unsqueeze, aten.squeeze, aten.select)
SIZED = (aten.expand, aten.reshape, aten.view, aten.repeat)


def evaluate_rows(
    module: fx.GraphModule, target: fx.Node, given: dict[fx.Node, Any], rows: Tensor, length: int, symbol: str
) -> Tensor:
    """The value of `target` [.., T, T] at `rows` of its dim -2; squares in `given` are cut to the rows already.

    `symbol` is the graph's name of T, `length` its value.

    Raises:
        ValueError: an operator on the way mixes rows or is not known.
    """
    reader = _Reader(module, rows, length, symbol)
    values = dict(given)
    with torch.no_grad():
        for node in ordered(cone([target], given), module.graph):
            if node not in values:
                values[node] = reader.run(node, values)
    value: Tensor = values[target]
    return value if reader.is_square(target) else reader.cut(value)


class _Reader:
    def __init__(self, module: fx.GraphModule, rows: Tensor, length: int, symbol: str) -> None:
        self.module, self.rows, self.length, self.symbol = module, rows, length, symbol

    def is_square(self, node: Any) -> bool:
        shape = shape_of(node) if isinstance(node, fx.Node) else ()
        return len(shape) >= 2 and str(shape[-1]) == str(shape[-2]) == self.symbol

    def cut(self, value: Any) -> Any:
        """A whole tensor at the rows, where it has rows at all."""
        if isinstance(value, Tensor) and value.ndim >= 2 and value.shape[-2] == self.length:
            return value.index_select(-2, self.rows)
        return value

    def run(self, node: fx.Node, values: dict[fx.Node, Any]) -> Any:
        if node.op == "get_attr":
            value = parameter(self.module, str(node.target))
            return self.cut(value) if self.is_square(node) else value
        if node.op != "call_function":
            raise ValueError(f"no value given for {node.op} {node.name}")
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: values[arg])
        if str(kwargs.get("device")) == "meta":
            kwargs = {**kwargs, "device": place_of(self.module)}
        call: Callable[..., Any] = node.target  # type: ignore[assignment]
        squares = [arg for arg in node.all_input_nodes if self.is_square(arg)]
        if not self.is_square(node):
            if squares and not is_op(node, aten.sym_size):
                raise ValueError(f"{node.name} mixes the rows of {squares[0].name}")
            return self.length if squares else call(*args, **kwargs)
        return self._square(node, call, list(args), kwargs, bool(squares))

    def _square(self, node: fx.Node, call: Callable[..., Any], args: list[Any], kwargs: Any, from_square: bool) -> Any:
        if is_op(node, aten.tril, aten.triu):
            return self._triangle(node, self._cut_input(node, args), *args[1:2])
        if is_op(node, *FACTORIES):
            return call(self._sizes(args[0]), *args[1:], **kwargs)
        if is_op(node, *NEW_FACTORIES):
            return call(args[0], self._sizes(args[1]), *args[2:], **kwargs)
        if _pointwise(node) or is_op(node, *LIKE):
            cut = (
                fx.node.map_aggregate(args, self.cut) if _pointwise(node) else [self._cut_input(node, args), *args[1:]]
            )
            return call(*cut, **kwargs)  # type: ignore[misc]
        if not from_square and not is_op(node, *SIZED):
            return self._whole(node, call, args, kwargs)
        if is_op(node, *VIEWS):
            return call(*args, **kwargs)
        if is_op(node, *SIZED) and len(args[1]) >= 2:
            return call(self._cut_input(node, args), self._sizes(args[1]), *args[2:], **kwargs)
        raise ValueError(f"{node.name} cannot be read row by row")

    def _cut_input(self, node: fx.Node, args: list[Any]) -> Any:
        return args[0] if self.is_square(node.args[0]) else self.cut(args[0])

    def _sizes(self, sizes: Any) -> list[Any]:
        """Sizes of the rows instead of the square's; -1 and 1 stay."""
        return [*sizes[:-2], len(self.rows) if sizes[-2] == self.length else sizes[-2], sizes[-1]]

    def _triangle(self, node: fx.Node, value: Tensor, diagonal: int = 0) -> Tensor:
        column = torch.arange(self.length)
        above = column[None, :] - self.rows[:, None]
        keep = above <= diagonal if is_op(node, aten.tril) else above >= diagonal
        return torch.where(keep, value, torch.zeros((), dtype=value.dtype))

    def _whole(self, node: fx.Node, call: Callable[..., Any], args: list[Any], kwargs: Any) -> Tensor:
        """Slices of a table, whose square exists anyway."""
        if self.length**2 > LARGEST_WHOLE:
            raise ValueError(f"{node.name} would need its whole square of {self.length} by {self.length}")
        value: Tensor = self.cut(call(*args, **kwargs))
        return value


def _pointwise(node: fx.Node) -> bool:
    tagged = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
    return tagged or is_op(node, *UNTAGGED)
