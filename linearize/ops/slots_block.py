"""`linearize::slots_block`: the queries of one block a row over [slots + log counts ; the block before ; their own].

           sum_c n_c e^{s_ic} v_c + sum_j e^{s_ij} v_j
    o_i = ---------------------------------------------        s_ij = scale q_i.k_j,   lse_i = log of the denominator
           sum_c n_c e^{s_ic}     + sum_j e^{s_ij}

q [B,T,H,d] with T <= w; k [B,w+T,G,d] and v [B,w+T,G,dv] are the w tokens of the block before and the T of this one:
query i sees the first w + i + 1 of them that `mask` bool [B,w+T] allows (None: all). Slots slot_k [B,G,C,d], slot_v
[B,G,C,dv], slot_n [B,G,C], of which 0 marks an empty one. Several blocks of one sequence are rows of the batch, each
with the slots that it sees. o [B,T,H,dv] in q's dtype, 0 where nothing is seen; lse [B,T,H] float32, or float64 for
float64 inputs. `linearize.ops.slots` is the whole mixer over T tokens; `linearize.ops.slots_merge` moves the slots on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._library import accumulation_dtype, define_operator, require
from linearize.ops.hybrid import fold_heads

SCHEMA = (
    "slots_block(Tensor q, Tensor k, Tensor v, Tensor slot_k, Tensor slot_v, Tensor slot_n, Tensor? mask=None, *, "
    "int window, float scale) -> (Tensor o, Tensor lse)"
)


def slots_block_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    mask: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The truth: one query at a time over what it sees; a slot of count n counts n times."""
    dtype, outputs, masses = accumulation_dtype(q.dtype), [], []
    group = q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        for i in range(q.shape[1]):
            seen = torch.ones(window + i + 1, dtype=torch.bool) if mask is None else mask[b, : window + i + 1]
            for h in range(q.shape[2]):
                g, query = h // group, q[b, i, h].to(dtype) * scale
                taken = slot_n[b, g] > 0
                keys = torch.cat([slot_k[b, g, taken].to(dtype), k[b, : window + i + 1, g][seen].to(dtype)])
                values = torch.cat([slot_v[b, g, taken].to(dtype), v[b, : window + i + 1, g][seen].to(dtype)])
                times = torch.cat([slot_n[b, g, taken].to(dtype), torch.ones(int(seen.sum()), dtype=dtype)])
                scores = keys @ query + times.log()
                outputs.append(torch.softmax(scores, 0) @ values)
                masses.append(torch.logsumexp(scores, 0))
    o, lse = torch.stack(outputs).view(*q.shape[:3], v.shape[3]), torch.stack(masses).view(q.shape[:3])
    return o.to(q.dtype), lse


def slots_block_decomposed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    mask: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """Standard operators, no loop."""
    check_block(q, k, v, slot_k, slot_v, slot_n, mask, window)
    batch, length, heads, _ = q.shape
    kv_heads, dtype, counts = k.shape[2], accumulation_dtype(q.dtype), slot_n.to(accumulation_dtype(q.dtype))
    keys = torch.cat([slot_k.to(dtype), k.to(dtype).transpose(1, 2)], dim=2)
    values = torch.cat([slot_v.to(dtype), v.to(dtype).transpose(1, 2)], dim=2)
    taken = counts > 0
    bias = torch.where(taken, torch.where(taken, counts, 1.0).log(), float("-inf"))
    column = torch.arange(k.shape[1], device=q.device)
    seen = column <= torch.arange(length, device=q.device)[:, None] + window
    near = torch.where(seen if mask is None else seen & mask[:, None], 0.0, float("-inf")).to(dtype)
    bias = torch.cat(
        [
            bias[:, :, None].expand(-1, -1, length, -1),
            near.expand(batch, length, -1)[:, None].expand(-1, kv_heads, -1, -1),
        ],
        dim=-1,
    )
    scores = fold_heads(q.to(dtype) * scale, kv_heads) @ keys.transpose(-1, -2)
    scores = scores.unflatten(2, (heads // kv_heads, length)) + bias[:, :, None]
    top = scores.amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    mass = weights.sum(dim=-1, keepdim=True)
    o = (weights / mass.masked_fill(mass == 0, 1.0)).flatten(2, 3) @ values
    lse = (torch.log(mass) + top).reshape(batch, heads, length).transpose(1, 2)
    o = o.reshape(batch, heads, length, v.shape[3]).transpose(1, 2)
    return o.to(q.dtype).contiguous(), lse.contiguous()


def check_block(
    q: Tensor, k: Tensor, v: Tensor, slot_k: Tensor, slot_v: Tensor, slot_n: Tensor, mask: Tensor | None, window: int
) -> None:
    """Raise `OperatorError` unless heads, the two blocks and the slots fit together."""
    name, heads, kv_heads, length = "slots_block", q.shape[2], k.shape[2], q.shape[1]
    require(heads % kv_heads == 0, name, f"{heads} query heads are no multiple of {kv_heads} kv heads")
    require(k.shape[1] == window + length, name, f"k holds {k.shape[1]} keys, not window + T = {window} + {length}")
    require(k.shape[:3] == v.shape[:3], name, "k and v differ in [B,w+T,G]")
    require(slot_k.shape[:3] == slot_n.shape == slot_v.shape[:3], name, "slot_k, slot_v and slot_n differ in [B,G,C]")
    require(mask is None or mask.dtype == torch.bool, name, "mask must be a bool of [B,w+T]")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    mask: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    check_block(q, k, v, slot_k, slot_v, slot_n, mask, window)
    return q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=accumulation_dtype(q.dtype))


SLOTS_BLOCK = define_operator(
    SCHEMA,
    fake=_fake,
    reference=slots_block_decomposed,
    recurrence=slots_block_recurrence,
    streamed=slots_block_decomposed,
)
slots_block = SLOTS_BLOCK.overload
