"""Inputs to evaluate a part of a graph on, where token values do not matter."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from linearize.program import MASK, POSITIONS, TOKENS, Program
from linearize.rewriting.walk import concrete_shape, shape_of


def plain_inputs(program: Program, batch: int, length: int) -> dict[fx.Node, Any]:
    """Token ids 0, a mask of ones, positions from 0, on the CPU."""
    ids = torch.zeros(batch, length, dtype=torch.int64)
    made = {TOKENS: ids, MASK: torch.ones_like(ids), POSITIONS: torch.arange(length).expand(batch, length).contiguous()}
    return {node: made[str(node.target)] for node in program.placeholders() if str(node.target) in made}


def random_like(
    program: Program, node: fx.Node, batch: int, length: int, generator: torch.Generator, same_tokens: bool = False
) -> torch.Tensor:
    """Random numbers of `node`'s shape at a batch and length; with `same_tokens` every token of a row has the same.

    Raises:
        ValueError: the shape has another symbol than those two.
    """
    tokens = next(item for item in program.placeholders() if item.target == TOKENS)
    sizes = dict(zip(map(str, shape_of(tokens)), (batch, length), strict=True))
    shape = concrete_shape(node, sizes)
    dtype = node.meta["val"].dtype
    if not same_tokens:
        return torch.randn(shape, generator=generator).to(dtype)
    dims = [dim for dim, size in enumerate(shape_of(node)) if str(size) == str(shape_of(tokens)[1])]
    if dims:
        once = [1 if dim == dims[0] else size for dim, size in enumerate(shape)]
        return torch.randn(once, generator=generator).to(dtype).expand(shape)
    if shape[0] != batch * length:
        raise ValueError(f"{node.name} has no dim of tokens")
    once = [batch, 1, *shape[1:]]
    return torch.randn(once, generator=generator).to(dtype).expand(batch, length, *shape[1:]).reshape(shape)
