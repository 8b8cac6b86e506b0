"""`linearize::slots_chunk`, softmax over two blocks of recent keys and C slots that stand for all keys before them.

           sum_{j in W(i)} e^{s_ij} v_j + sum_c n_c e^{s_ic} v_c
    o_i = ------------------------------------------------------        s_ij = scale q_i.k_j,  s_ic = scale q_i.k_c
           sum_{j in W(i)} e^{s_ij}     + sum_c n_c e^{s_ic}

A row's real tokens are numbered by rank p; block b holds ranks b w .. b w + w - 1. W(i) is the query's own block up to
itself and the block before it. Slot c is the mean key, mean value and count of the tokens merged into it. When block b
is complete, the tokens of block b - 1 join the slots as items of count 1 and merging brings all back to C
(`linearize.ops.slot_merge`). Exact softmax while a row has no more than C + w tokens.

q [B,T,H,d], k [B,T,G,d], v [B,T,G,dv] are T new tokens, mask [B,T] says which are real (columns without one may stand
anywhere; their outputs are finite), before int64 [B] counts a row's real tokens before the call. State: ring_k
[B,2w,G,d], ring_v [B,2w,G,dv] hold the token of rank p at p % 2w; slot_k [B,G,C,d], slot_v [B,G,C,dv], slot_n [B,G,C]
in float32, or float64 for float64 inputs. Once all slots are
taken, each block that joins leaves `decay` of the counts before it, the first `sinks` slots excepted. o has q's dtype.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import SymInt, Tensor

from linearize.ops._library import accumulation_dtype, define_operator, require
from linearize.ops.blocks import Tensors, Tokens, check_blocks, loop, take
from linearize.ops.slot_merge import aged, merge, merge_one_by_one, round_sizes

SCHEMA = (
    "slots_chunk(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor before, Tensor ring_k, Tensor ring_v, "
    "Tensor slot_k, Tensor slot_v, Tensor slot_n, *, "
    "int window, float scale, int sinks=0, int rounds=1, float decay=1.0) -> "
    "(Tensor o, Tensor ring_k, Tensor ring_v, Tensor slot_k, Tensor slot_v, Tensor slot_n)"
)
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Policy(NamedTuple):
    """How items merge: the sizes after each round, the tokens that never merge, and what a full set of slots keeps of
    its counts when a block joins."""

    sizes: list[int]
    sinks: int
    decay: float


def slots_chunk_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    before: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    *,
    window: int,
    scale: float,
    sinks: int = 0,
    rounds: int = 1,
    decay: float = 1.0,
) -> Outputs:
    """The truth: one row and one token at a time."""
    dtype = accumulation_dtype(q.dtype)
    sizes = round_sizes(slot_n.shape[2] + window, slot_n.shape[2], sinks, rounds)
    policy = Policy(sizes, sinks, decay)
    rows = []
    for b in range(q.shape[0]):
        p, ring, slots = int(before[b]), [ring_k[b], ring_v[b]], [slot_k[b], slot_v[b], slot_n[b].to(dtype)]
        outputs = []
        for t in range(q.shape[1]):
            if not mask[b, t]:
                outputs.append(torch.zeros_like(v[b, t]).repeat_interleave(q.shape[2] // k.shape[2], dim=0))
                continue
            here = (torch.arange(2 * window) == p % (2 * window))[:, None, None]
            ring = [torch.where(here, new[b, t], old) for new, old in zip((k, v), ring, strict=True)]
            first = max(0, (p // window - 1) * window)
            seen = [rank % (2 * window) for rank in range(first, p + 1)]
            outputs.append(_read_one(q[b, t].to(dtype) * scale, *(x[seen].to(dtype) for x in ring), *slots))
            p += 1
            if p % window == 0 and p > window:
                left = [rank % (2 * window) for rank in range(p - 2 * window, p - window)]
                slots = _join_one([x[left].to(dtype) for x in ring], slots, policy)
        rows.append((torch.stack(outputs).to(q.dtype), *ring, *slots))
    o, ring_k, ring_v, slot_k, slot_v, slot_n = (torch.stack(part) for part in zip(*rows, strict=True))
    return o, ring_k, ring_v, slot_k, slot_v, slot_n


def _read_one(q: Tensor, k: Tensor, v: Tensor, slot_k: Tensor, slot_v: Tensor, slot_n: Tensor) -> Tensor:
    """q [H,d], k [J,G,d], v [J,G,dv] and the slots [G,C,..] -> [H,dv]."""
    group = q.shape[0] // k.shape[1]
    keys, values = torch.cat([slot_k, k.transpose(0, 1)], 1), torch.cat([slot_v, v.transpose(0, 1)], 1)
    bias = torch.cat([slot_n.log(), slot_n.new_zeros(slot_n.shape[0], k.shape[0])], 1)
    scores = torch.einsum("hd,hjd->hj", q, keys.repeat_interleave(group, 0)) + bias.repeat_interleave(group, 0)
    return torch.einsum("hj,hjv->hv", torch.softmax(scores, -1), values.repeat_interleave(group, 0))


def _join_one(left: list[Tensor], slots: list[Tensor], policy: Policy) -> list[Tensor]:
    """The slots [G,C,..] after the tokens left, k [w,G,d] and v [w,G,dv], joined them."""
    (k, v), (slot_k, slot_v, slot_n), heads = left, slots, []
    keys, values = torch.cat([slot_k, k.transpose(0, 1)], 1), torch.cat([slot_v, v.transpose(0, 1)], 1)
    if bool((slot_n > 0).all()):
        slot_n = torch.cat([slot_n[:, : policy.sinks], slot_n[:, policy.sinks :] * policy.decay], 1)
    counts = torch.cat([slot_n, slot_n.new_ones(slot_n.shape[0], k.shape[0])], 1)
    for g in range(slot_n.shape[0]):
        heads.append(merge_one_by_one(keys[g], values[g], counts[g], keys[g], policy.sizes, policy.sinks))
    return [torch.stack(part) for part in zip(*heads, strict=True)]


# ---- standard operators, block by block ------------------------------------------------------------------------------


def slots_chunk_decomposed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    before: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    *,
    window: int,
    scale: float,
    sinks: int = 0,
    rounds: int = 1,
    decay: float = 1.0,
) -> Outputs:
    """Standard operators, one iteration a block: a Python loop, or where T is symbolic the operator `scan`.

    Rows may stand at different places of their blocks; all advance one block an iteration, ceil((T + w - 1) / w) in
    all, and no scores are wider than [B,H,w,2w+C].
    """
    check_slots(q, k, v, mask, before, (ring_k, ring_v), (slot_k, slot_v, slot_n), window, sinks)
    new = Tokens.of(q, k, v, mask, before, window)
    policy = Policy(round_sizes(slot_n.shape[2] + window, slot_n.shape[2], sinks, rounds), sinks, decay)
    length, dtype = q.shape[1], accumulation_dtype(q.dtype)
    width = torch.sym_min(length, window) if isinstance(length, SymInt) else min(length, window)
    offsets = torch.arange(width, device=q.device)
    slots: Tensors = (slot_k.to(dtype), slot_v.to(dtype), slot_n.to(dtype))

    def body(slots: Tensors, number: Tensor, offsets: Tensor, *rest: Tensor) -> tuple[Tensor, Tensors]:
        tokens, (ring_k, ring_v) = Tokens(window, *rest[:7]), rest[7:]
        return _block(number, offsets, tokens, ring_k, ring_v, slots, window, scale, policy)

    numbers = torch.arange((length + 2 * window - 2) // window, device=q.device)
    o, slots = loop(body, slots, numbers, (offsets, *new[1:], ring_k, ring_v))
    place = new.phase[:, None] + new.order
    number = torch.div(place, window, rounding_mode="floor")
    offset = new.order - (number * window - new.phase[:, None]).clamp(min=0)
    o = o[number, torch.arange(q.shape[0], device=q.device)[:, None], offset]
    end = new.before + new.total
    return o.to(q.dtype), new.ring_at(end, ring_k, new.k), new.ring_at(end, ring_v, new.v), slots[0], slots[1], slots[2]


def _block(
    number: Tensor,
    offsets: Tensor,
    new: Tokens,
    ring_k: Tensor,
    ring_v: Tensor,
    slots: Tensors,
    window: int,
    scale: float,
    policy: Policy,
) -> tuple[Tensor, Tensors]:
    """Iteration `number`: (o [B,W,H,dv] of the tokens that fall in it, the slots after it)."""
    start = (number * window - new.phase).clamp(min=0)
    stop = torch.minimum((number + 1) * window - new.phase, new.total)
    k, v = (new.ring_at(new.before + stop, ring, x) for ring, x in ((ring_k, new.k), (ring_v, new.v)))
    block = torch.div(new.before - new.phase, window, rounding_mode="floor") + number
    index = (start[:, None] + offsets).clamp(max=new.q.shape[1] - 1)
    o = _read(take(new.q, index), k, v, slots, (new.before[:, None] + index) % window, block, scale)
    done = ((number + 1) * window - new.phase <= new.total) & (block >= 1)
    return o, _join(k, v, slots, block, done, policy)


def _read(q: Tensor, k: Tensor, v: Tensor, slots: Tensors, place: Tensor, block: Tensor, scale: float) -> Tensor:
    """q [B,W,H,d] at `place` [B,W] of its block over the ring [B,2w,G,..] and the slots; [B,W,H,dv]."""
    batch, width, heads, head_dim = q.shape
    slot_k, slot_v, slot_n = slots
    kv_heads, window, dtype = k.shape[2], k.shape[1] // 2, slot_k.dtype
    column = torch.arange(2 * window, device=q.device)
    half = torch.div(column, window, rounding_mode="floor")
    own = (half == (block % 2)[:, None])[:, None]
    seen = (own & (column % window <= place[:, :, None])) | (~own & (block >= 1)[:, None, None])
    folded = (q.to(dtype) * scale).reshape(batch, width, kv_heads, heads // kv_heads, head_dim).permute(0, 2, 3, 1, 4)
    near = folded @ k.to(dtype).permute(0, 2, 3, 1).unsqueeze(2)
    far = folded @ slot_k.transpose(-1, -2).unsqueeze(2)
    mass = torch.where(slot_n > 0, slot_n, 1.0).log()
    far = (far + mass[:, :, None, None]).masked_fill(~(slot_n > 0)[:, :, None, None], float("-inf"))
    scores = torch.cat([far, near.masked_fill(~seen[:, None, None], float("-inf"))], dim=-1)
    values = torch.cat([slot_v, v.to(dtype).transpose(1, 2)], dim=2)
    o = torch.softmax(scores, dim=-1) @ values.unsqueeze(2)
    return o.permute(0, 3, 1, 2, 4).reshape(batch, width, heads, v.shape[3])


def _join(k: Tensor, v: Tensor, slots: Tensors, block: Tensor, done: Tensor, policy: Policy) -> Tensors:
    """Where `done` [B], the block before `block` leaves the ring and joins the slots."""
    dtype, window = slots[0].dtype, k.shape[1] // 2
    odd = (block % 2 == 1)[:, None, None, None]
    left = (torch.where(odd, x[:, :window], x[:, window:]).to(dtype).transpose(1, 2) for x in (k, v))
    keys, values = (torch.cat([old, item], dim=2) for old, item in zip(slots[:2], left, strict=True))
    counts = torch.cat([aged(slots[2], policy.sinks, policy.decay), torch.ones_like(keys[:, :, -window:, 0])], dim=2)
    merged = merge(keys, values, counts, keys, policy.sizes, policy.sinks)
    which = done[:, None, None]
    return tuple(
        torch.where(which if new.ndim == 3 else which[..., None], new, old)
        for new, old in zip(merged, slots, strict=True)
    )


def check_slots(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    before: Tensor,
    ring: tuple[Tensor, Tensor],
    slots: tuple[Tensor, Tensor, Tensor],
    window: int,
    sinks: int,
) -> None:
    """Raise `OperatorError` unless heads, ring and slots fit together."""
    name = "slots_chunk"
    check_blocks(name, q, k, v, mask, before, ring, window)
    count = slots[2].shape[2]
    require(slots[0].shape[2] == count == slots[1].shape[2], name, "slot_k, slot_v and slot_n differ in [B,G,C]")
    require(count >= max(1, 2 * sinks), name, f"{count} slots are too few to keep {sinks} sinks; give {2 * sinks}")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    before: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    *,
    window: int,
    scale: float,
    sinks: int = 0,
    rounds: int = 1,
    decay: float = 1.0,
) -> Outputs:
    check_slots(q, k, v, mask, before, (ring_k, ring_v), (slot_k, slot_v, slot_n), window, sinks)
    dtype = accumulation_dtype(q.dtype)
    rings = tuple(x.new_empty(x.shape) for x in (ring_k, ring_v))
    slots = tuple(x.new_empty(x.shape, dtype=dtype) for x in (slot_k, slot_v, slot_n))
    return (q.new_empty(*q.shape[:3], v.shape[3]), *rings, *slots)  # type: ignore[return-value]


SLOTS_CHUNK = define_operator(
    SCHEMA,
    fake=_fake,
    reference=slots_chunk_decomposed,
    recurrence=slots_chunk_recurrence,
    streamed=slots_chunk_decomposed,
)
slots_chunk = SLOTS_CHUNK.overload
