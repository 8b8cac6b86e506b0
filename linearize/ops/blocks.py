"""T new tokens in blocks of w, counted by rank: what `slots_chunk` and `evict_chunk` share.

Rows may stand at different places of their blocks; all advance one block an iteration, ceil((T + w - 1) / w) in all. A
ring of two blocks holds the token of rank p at column p % 2w.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import SymInt, Tensor
from torch._higher_order_ops.scan import scan_op

from linearize.ops._library import require

Tensors = tuple[Tensor, ...]


def check_blocks(
    name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, before: Tensor, ring: tuple[Tensor, Tensor], window: int
) -> None:
    """Raise `OperatorError` unless the new tokens of the operator `name` fit each other and the ring."""
    heads, kv_heads, held = q.shape[2], k.shape[2], ring[0].shape[1]
    require(window >= 1, name, f"window is {window}, needs at least 1")
    require(heads % kv_heads == 0, name, f"{heads} query heads are no multiple of {kv_heads} kv heads")
    require(k.shape[:3] == v.shape[:3], name, "k and v differ in [B,T,G]")
    require(mask.shape == q.shape[:2] and mask.dtype == torch.bool, name, "mask must be a bool of [B,T]")
    require(before.ndim == 1, name, "before must be int64 of [B]")
    require(held == 2 * window == ring[1].shape[1], name, f"the ring holds {held} tokens, not two blocks of {window}")


class Tokens(NamedTuple):
    """The new tokens with each row's real ones in front: q, k, v; total, before, phase (place in the block) int64 [B];
    order int64 [B,T], where the token of a column stands now."""

    window: int
    q: Tensor
    k: Tensor
    v: Tensor
    total: Tensor
    before: Tensor
    phase: Tensor
    order: Tensor

    @staticmethod
    def of(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, before: Tensor, window: int) -> Tokens:
        seen = torch.cumsum(mask.to(torch.int64), dim=1)
        order = (seen - 1).clamp(min=0)
        columns = torch.arange(q.shape[1], device=q.device).expand(mask.shape)
        target = torch.where(mask, order, q.shape[1])
        column = torch.cat([torch.zeros_like(columns), torch.zeros_like(columns[:, :1])], 1)
        column = column.scatter(1, target, columns)[:, :-1]
        q, k, v = (take(x, column) for x in (q, k, v))
        return Tokens(window, q, k, v, seen[:, -1], before, before % window, order)

    def ring_at(self, end: Tensor, ring: Tensor, new: Tensor) -> Tensor:
        """The ring [B,2w,G,d] after `end` [B] tokens: column c has the last rank with rank % 2w = c."""
        size = 2 * self.window
        last = end[:, None] - 1
        rank = last - (last - torch.arange(size, device=ring.device)) % size
        index = rank - self.before[:, None]
        arrived = (index >= 0)[:, :, None, None]
        return torch.where(arrived, take(new, index.clamp(min=0)), ring)


def take(x: Tensor, index: Tensor) -> Tensor:
    """x [B,T,..], index int64 [B,n] -> [B,n,..]."""
    return x.gather(1, index[:, :, None, None].expand(-1, -1, x.shape[2], x.shape[3]))


def loop(
    body: Callable[..., tuple[Tensor, Tensors]], carried: Tensors, numbers: Tensor, fixed: Tensors
) -> tuple[Tensor, Tensors]:
    """(the outputs of all blocks stacked, what is carried out of the last): body(carried, number, *fixed) -> (output,
    carried)."""
    if isinstance(numbers.shape[0], SymInt):
        return _scan(body, carried, numbers, fixed)
    outputs = []
    for number in numbers:
        output, carried = body(carried, number, *fixed)
        outputs.append(output)
    return torch.stack(outputs), carried


def _scan(
    body: Callable[..., tuple[Tensor, Tensors]], carried: Tensors, numbers: Tensor, fixed: Tensors
) -> tuple[Tensor, Tensors]:
    """`loop` as one node of the graph, which ONNX has under the same name."""

    def step(*flat: Tensor) -> list[Tensor]:
        output, after = body(flat[: len(carried)], *flat[len(carried) :])
        return [*after, output.contiguous()]

    *after, outputs = scan_op(step, [x.clone() for x in carried], [numbers], fixed)
    return outputs, tuple(after)
