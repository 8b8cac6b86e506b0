"""`linearize::slots_merge`: a block of tokens joins the slots, and the cheapest pairs merge until C are left.

slot_k [B,G,C,d], slot_v [B,G,C,dv], slot_n [B,G,C] (0: empty) and the leaving block k [B,w,G,d], v [B,w,G,dv], whose
tokens count 1 each -> the same slots after it. Cost, rounds, order and ties: `linearize.ops.slot_merge`. `metric`
[G,d,e] maps keys and `lam` [G] weighs values before distances are taken (None: the keys as they are). The first `sinks`
slots never merge. Once all slots are taken, each block that joins leaves `decay` of the counts before it, the sinks'
excepted. Deterministic. Differentiable in keys and values; which items merge is not.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._library import accumulation_dtype, define_operator, require
from linearize.ops.slot_merge import aged, features, merge, merge_one_by_one, round_sizes

SCHEMA = (
    "slots_merge(Tensor slot_k, Tensor slot_v, Tensor slot_n, Tensor k, Tensor v, Tensor? metric=None, "
    "Tensor? lam=None, *, int sinks=0, int rounds=1, float decay=1.0) -> "
    "(Tensor slot_k, Tensor slot_v, Tensor slot_n)"
)
Slots = tuple[Tensor, Tensor, Tensor]


def slots_merge_recurrence(
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    k: Tensor,
    v: Tensor,
    metric: Tensor | None = None,
    lam: Tensor | None = None,
    *,
    sinks: int = 0,
    rounds: int = 1,
    decay: float = 1.0,
) -> Slots:
    """The truth: head by head, pair by pair."""
    count = slot_n.shape[2]
    sizes = round_sizes(count + k.shape[1], count, sinks, rounds)
    keys, values, counts = items(slot_k, slot_v, slot_n, k, v, sinks, decay)
    y, rows = features(keys, values, metric, lam), []
    for b in range(slot_k.shape[0]):
        heads = [
            merge_one_by_one(keys[b, g], values[b, g], counts[b, g], y[b, g], sizes, sinks)
            for g in range(slot_k.shape[1])
        ]
        rows.append([torch.stack(part) for part in zip(*heads, strict=True)])
    merged_k, merged_v, merged_n = (torch.stack(part) for part in zip(*rows, strict=True))
    return merged_k, merged_v, merged_n


def slots_merge_decomposed(
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    k: Tensor,
    v: Tensor,
    metric: Tensor | None = None,
    lam: Tensor | None = None,
    *,
    sinks: int = 0,
    rounds: int = 1,
    decay: float = 1.0,
) -> Slots:
    """Standard operators; a loop over rounds alone."""
    check_merge(slot_k, slot_v, slot_n, k, v, sinks)
    count = slot_n.shape[2]
    sizes = round_sizes(count + k.shape[1], count, sinks, rounds)
    keys, values, counts = items(slot_k, slot_v, slot_n, k, v, sinks, decay)
    merged_k, merged_v, merged_n = merge(keys, values, counts, features(keys, values, metric, lam), sizes, sinks)
    return merged_k.contiguous(), merged_v.contiguous(), merged_n.contiguous()


def items(
    slot_k: Tensor, slot_v: Tensor, slot_n: Tensor, k: Tensor, v: Tensor, sinks: int, decay: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [B,G,C+w,d], values [B,G,C+w,dv] and counts [B,G,C+w] of the slots, aged, and of the tokens behind them."""
    dtype = accumulation_dtype(slot_k.dtype)
    keys = torch.cat([slot_k.to(dtype), k.to(dtype).transpose(1, 2)], dim=2)
    values = torch.cat([slot_v.to(dtype), v.to(dtype).transpose(1, 2)], dim=2)
    ones = torch.ones_like(keys[:, :, slot_n.shape[2] :, 0])
    return keys, values, torch.cat([aged(slot_n.to(dtype), sinks, decay), ones], dim=2)


def check_merge(slot_k: Tensor, slot_v: Tensor, slot_n: Tensor, k: Tensor, v: Tensor, sinks: int) -> None:
    """Raise `OperatorError` unless slots and block fit together."""
    name, count = "slots_merge", slot_n.shape[2]
    require(slot_k.shape[:3] == slot_n.shape == slot_v.shape[:3], name, "slot_k, slot_v and slot_n differ in [B,G,C]")
    require(k.shape[:3] == v.shape[:3], name, "k and v differ in [B,w,G]")
    require(k.shape[2] == slot_n.shape[1], name, f"{k.shape[2]} kv heads leave, the slots have {slot_n.shape[1]}")
    require(count >= max(1, 2 * sinks), name, f"{count} slots are too few to keep {sinks} sinks; give {2 * sinks}")


def _fake(
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    k: Tensor,
    v: Tensor,
    metric: Tensor | None = None,
    lam: Tensor | None = None,
    *,
    sinks: int = 0,
    rounds: int = 1,
    decay: float = 1.0,
) -> Slots:
    check_merge(slot_k, slot_v, slot_n, k, v, sinks)
    dtype = accumulation_dtype(slot_k.dtype)
    return tuple(x.new_empty(x.shape, dtype=dtype) for x in (slot_k, slot_v, slot_n))  # type: ignore[return-value]


SLOTS_MERGE = define_operator(
    SCHEMA,
    fake=_fake,
    reference=slots_merge_decomposed,
    recurrence=slots_merge_recurrence,
    streamed=slots_merge_decomposed,
)
slots_merge = SLOTS_MERGE.overload
