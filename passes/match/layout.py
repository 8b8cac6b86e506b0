"""How a chain of operators lays out the product [B, H, x, y] that it starts from, found by moving single scores.

Sources write scores as [B, H, T, S], [B*H, T, S], [B, T, S, H] or [B, G, R, T, S], and some put the keys on the left of
the product. Softmax runs over the last dim of the scores (`normalise/spell_softmax.py`), which is the keys'.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import permutations

import torch
from torch import Tensor, fx

from linearize.program import Program
from linearize.rewriting.probes import plain_inputs
from linearize.rewriting.walk import evaluate, shape_of

Arrange = Callable[[Tensor], Tensor]
ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError)


@dataclass(frozen=True)
class Layout:
    """`arrange` brings the value of the scores to [B, H, queries, keys] (None: they are in that order); `turned`: the
    keys are the product's left operand."""

    arrange: Arrange | None
    turned: bool = False


STRAIGHT = Layout(None)


def read_layout(program: Program, scores: fx.Node, product: fx.Node, heads: int) -> Layout | None:
    """How `scores` lay out `product` [B, H, x, y]; None where single scores cannot be followed through the chain."""
    if scores is product:
        return Layout(None)
    batch, length = (2 if heads != 2 else 3), (7 if heads != 7 else 11)
    moved = torch.zeros(batch, heads, length, length, dtype=torch.bool)
    for b, h, x, y in ((1, 0, 4, 3), (0, heads - 1, 5, 5), (1, heads - 1, 2, 2)):
        moved[b, h, x, y] = True
    for start in (moved, moved.transpose(-1, -2)):
        try:
            layout = _fitting(_changed(program, scores, product, start), start, heads)
        except ERRORS:
            return None
        if layout is not None:
            return layout
    same = [str(size) for size in shape_of(scores)] == [str(size) for size in shape_of(product)]
    return Layout(None) if same else None


def _changed(program: Program, scores: fx.Node, product: fx.Node, moved: Tensor) -> Tensor:
    """Bool: the scores that differ when the product is moved where `moved` holds."""
    dtype = product.meta["val"].dtype
    given = plain_inputs(program, moved.shape[0], moved.shape[-1])
    values = [
        evaluate(program.module, [scores], {**given, product: start})[0]
        for start in (torch.zeros(moved.shape, dtype=dtype), moved.to(dtype) * 0.5)
    ]
    return values[0] != values[1]


def _fitting(changed: Tensor, moved: Tensor, heads: int) -> Layout | None:
    """The arrangement under which what changed is what was moved: nothing else, and one score off the diagonal at
    least, which tells queries from keys."""
    diagonal = torch.eye(moved.shape[-1], dtype=torch.bool)
    for arrange, turned in _arrangements(changed.ndim, heads):
        value = arrange(changed)
        if value.shape == moved.shape and not bool((value & ~moved).any()) and bool((value & ~diagonal).any()):
            straight = changed.ndim == 4 and value.stride() == changed.stride()
            if turned:
                return Layout(_turned(arrange), True)
            return Layout(None if straight else arrange)
    return None


def _turned(arrange: Arrange) -> Arrange:
    return lambda value: arrange(value).transpose(-1, -2)


def _arrangements(rank: int, heads: int) -> Iterator[tuple[Arrange, bool]]:
    """Ways back to the product's [B, H, x, y] from scores whose last dim is the keys, and whether the keys are x."""
    if rank == 4:
        for order in permutations(range(4)):
            if order.index(3) >= 2:
                yield (lambda value, order=order: value.permute(order)), order.index(3) == 2  # type: ignore[misc]
    for last_two, turned in (((-2, -1), False), ((-1, -2), True)):
        if rank == 3:
            yield _merged(heads, last_two, heads_first=False), turned
            yield _merged(heads, last_two, heads_first=True), turned
        if rank == 5:
            yield (lambda value, dims=last_two: value.flatten(1, 2).movedim(dims, (-2, -1))), turned  # type: ignore[misc]


def _merged(heads: int, last_two: tuple[int, int], heads_first: bool) -> Arrange:
    def arrange(value: Tensor) -> Tensor:
        if heads_first:
            return value.unflatten(0, (heads, -1)).transpose(0, 1).movedim(last_two, (-2, -1))
        return value.unflatten(0, (-1, heads)).movedim(last_two, (-2, -1))

    return arrange
