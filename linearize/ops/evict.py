"""`linearize::evict_chunk`, softmax over two blocks of recent keys and the C older tokens with the highest scores.

    o_i = sum_{j in W(i) u K} e^{s_ij} v_j / sum_{j in W(i) u K} e^{s_ij}              s_ij = scale q_i.k_j

A row's real tokens are numbered by rank p; block b holds ranks b w .. b w + w - 1. W(i) is the query's own block up to
itself and the block before it, K the tokens kept of all earlier blocks. When block b is complete, the tokens of block
b - 1 join K, of which the C with the highest score stay, in their order; ties, of scores compared as bfloat16 so that
rounding seldom decides, go to the later token. The first `sinks` tokens of a row always stay. The score of token j at
kv head g is one of

    f_g.k_j                          `filters` f [G,d]: what the key alone says (Q-Filters, Godey et al. 2025)
    a_j = sum_i softmax(s_i.)_j      `mass` [B,G,C+2w]: the weight it had from the queries of its head. At each block's
                                     end a <- memory a: 0 lets the last block decide, 1 all queries so far

q [B,T,H,d], k [B,T,G,d], v [B,T,G,dv] are T new tokens, mask [B,T] says which are real (columns without one may stand
anywhere; their outputs are finite), before int64 [B] counts a row's real tokens before the call. State: ring_k
[B,2w,G,d], ring_v [B,2w,G,dv] hold the token of rank p at p % 2w; kept_k [B,G,C,d], kept_v [B,G,C,dv] in order of rank,
and mass float32 (float64 for float64 inputs), of K and then of the ring's columns; empty when filters are given. o has
q's dtype. Differentiable in q, k and v; which tokens stay is not.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import SymInt, Tensor

from linearize.ops._library import accumulation_dtype, define_operator, require
from linearize.ops.blocks import Tensors, Tokens, check_blocks, loop, take
from linearize.ops.slot_merge import coarse

SCHEMA = (
    "evict_chunk(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor before, Tensor ring_k, Tensor ring_v, "
    "Tensor kept_k, Tensor kept_v, Tensor? mass=None, Tensor? filters=None, *, "
    "int window, float scale, int sinks=0, float memory=0.0) -> "
    "(Tensor o, Tensor ring_k, Tensor ring_v, Tensor kept_k, Tensor kept_v, Tensor mass)"
)
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


class Rule(NamedTuple):
    """Block length, scale of the scores, tokens that always stay, what a block's end leaves of the masses, and whether
    to look first if any row is at a block's end (which reads a value, so no graph can be traced)."""

    window: int
    scale: float
    sinks: int
    memory: float
    looks: bool = False


# ---- the truth -------------------------------------------------------------------------------------------------------


def evict_chunk_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    before: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    mass: Tensor | None = None,
    filters: Tensor | None = None,
    *,
    window: int,
    scale: float,
    sinks: int = 0,
    memory: float = 0.0,
) -> Outputs:
    """One row and one token at a time."""
    dtype, rows = accumulation_dtype(q.dtype), []
    places = kept_k.shape[2]
    for b in range(q.shape[0]):
        p, ring, kept = int(before[b]), [ring_k[b], ring_v[b]], [kept_k[b], kept_v[b]]
        weight = kept_k.new_zeros(k.shape[2], places + 2 * window, dtype=dtype) if mass is None else mass[b].to(dtype)
        outputs = []
        for t in range(q.shape[1]):
            if not mask[b, t]:
                outputs.append(torch.zeros_like(v[b, t]).repeat_interleave(q.shape[2] // k.shape[2], dim=0))
                continue
            column = p % (2 * window)
            here = torch.arange(2 * window) == column
            ring = [torch.where(here[:, None, None], x[b, t], old) for x, old in zip((k, v), ring, strict=True)]
            held = min(places, max(p // window - 1, 0) * window)
            first = max(0, (p // window - 1) * window)
            seen = [*range(held), *(places + rank % (2 * window) for rank in range(first, p + 1))]
            keys, values = (torch.cat([old, x.transpose(0, 1)], 1) for old, x in zip(kept, ring, strict=True))
            o, added = _read_one(q[b, t].to(dtype) * scale, keys[:, seen].to(dtype), values[:, seen].to(dtype))
            outputs.append(o)
            weight = weight.index_fill(1, torch.tensor([places + column]), 0.0)
            weight = weight.index_add(1, torch.tensor(seen), added)
            p += 1
            if p % window:
                continue
            if p > window:
                left = [places + rank % (2 * window) for rank in range(p - 2 * window, p - window)]
                candidates = [*range(held), *left]
                heads = range(len(keys))
                chosen = [_choose_one(keys[g], weight[g], filters, g, candidates, places, sinks) for g in heads]
                kept = [
                    torch.stack([_filled(x[g, chosen[g]], places) for g in heads]) for x in (keys, values)
                ]
                stays = torch.stack([_filled(weight[g, chosen[g]], places) for g in heads])
                weight = torch.cat([stays, weight[:, places:]], 1)
            weight = weight * memory
        rows.append((torch.stack(outputs).to(q.dtype), *ring, *kept, weight[:, : 0 if mass is None else None]))
    o, ring_k, ring_v, kept_k, kept_v, weight = (torch.stack(part) for part in zip(*rows, strict=True))
    return o, ring_k, ring_v, kept_k, kept_v, weight


def _read_one(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """q [H,d], k [G,J,d], v [G,J,dv] -> (o [H,dv], the weights summed over the queries of a head [G,J])."""
    group = q.shape[0] // k.shape[0]
    weights = torch.softmax(torch.einsum("hd,hjd->hj", q, k.repeat_interleave(group, 0)), -1)
    o = torch.einsum("hj,hjv->hv", weights, v.repeat_interleave(group, 0))
    return o, weights.detach().unflatten(0, (-1, group)).sum(1)


def _choose_one(
    keys: Tensor, mass: Tensor, filters: Tensor | None, head: int, candidates: list[int], places: int, sinks: int
) -> list[int]:
    """Which of the candidates (in order of rank) of one head stay, in order of rank."""
    scores = mass if filters is None else keys.to(mass.dtype) @ filters[head].to(mass.dtype)
    scores = coarse(scores.detach())
    order = sorted(range(len(candidates)), key=lambda j: (j < sinks, float(scores[candidates[j]]), j), reverse=True)
    return [candidates[j] for j in sorted(order[:places])]


def _filled(x: Tensor, places: int) -> Tensor:
    return torch.cat([x, x.new_zeros(places - x.shape[0], *x.shape[1:])])


# ---- standard operators, block by block ------------------------------------------------------------------------------


def evict_chunk_decomposed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    before: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    mass: Tensor | None = None,
    filters: Tensor | None = None,
    *,
    window: int,
    scale: float,
    sinks: int = 0,
    memory: float = 0.0,
) -> Outputs:
    """Standard operators, one iteration a block: a Python loop, or where T is symbolic the operator `scan`. No scores
    are wider than [B,H,w,2w+C]."""
    check_evict(q, k, v, mask, before, (ring_k, ring_v), (kept_k, kept_v), mass, filters, window, sinks)
    rule = Rule(window, scale, sinks, memory)
    return by_blocks(Tokens.of(q, k, v, mask, before, window), (ring_k, ring_v), kept_k, kept_v, mass, filters, rule)


def by_blocks(
    new: Tokens, rings: Tensors, kept_k: Tensor, kept_v: Tensor, mass: Tensor | None, filters: Tensor | None, rule: Rule
) -> Outputs:
    """The operator on the new tokens."""
    q, window = new.q, rule.window
    length, dtype = q.shape[1], accumulation_dtype(q.dtype)
    width = torch.sym_min(length, window) if isinstance(length, SymInt) else min(length, window)
    offsets = torch.arange(width, device=q.device)
    carried: Tensors = (kept_k, kept_v) if mass is None else (kept_k, kept_v, mass.to(dtype))
    decides: Tensors = () if filters is None else (filters.to(dtype),)

    def body(carried: Tensors, number: Tensor, offsets: Tensor, *rest: Tensor) -> tuple[Tensor, Tensors]:
        return _block(number, offsets, Tokens(window, *rest[:7]), rest[7:9], carried, rest[9:], rule)

    numbers = torch.arange((length + 2 * window - 2) // window, device=q.device)
    o, carried = loop(body, carried, numbers, (offsets, *new[1:], *rings, *decides))
    place = new.phase[:, None] + new.order
    number = torch.div(place, window, rounding_mode="floor")
    offset = new.order - (number * window - new.phase[:, None]).clamp(min=0)
    o = o[number, torch.arange(q.shape[0], device=q.device)[:, None], offset].to(q.dtype)
    end = new.before + new.total
    after = (new.ring_at(end, ring, x) for ring, x in zip(rings, (new.k, new.v), strict=True))
    return o, *after, carried[0], carried[1], carried[2] if mass is not None else no_mass(kept_k)  # type: ignore[return-value]


def no_mass(kept_k: Tensor) -> Tensor:
    return kept_k.new_zeros(kept_k.shape[0], kept_k.shape[1], 0, dtype=accumulation_dtype(kept_k.dtype))


def _block(
    number: Tensor, offsets: Tensor, new: Tokens, rings: Tensors, carried: Tensors, filters: Tensors, rule: Rule
) -> tuple[Tensor, Tensors]:
    """Iteration `number`: (o [B,W,H,dv] of the tokens that fall in it, what is kept after it)."""
    window, places = rule.window, carried[0].shape[2]
    start = (number * window - new.phase).clamp(min=0)
    stop = torch.minimum((number + 1) * window - new.phase, new.total)
    k, v = (new.ring_at(new.before + stop, ring, x) for ring, x in zip(rings, (new.k, new.v), strict=True))
    block = torch.div(new.before - new.phase, window, rounding_mode="floor") + number
    held = ((block - 1).clamp(min=0) * window).clamp(max=places)
    index = start[:, None] + offsets
    inside = index < stop[:, None]
    index = index.clamp(max=new.q.shape[1] - 1)
    place = (new.before[:, None] + index) % window
    o, weights = _read(take(new.q, index), (k, v), carried, held, place, block, rule.scale)
    whole = (number + 1) * window - new.phase <= new.total
    if len(carried) == 3:
        fresh = _arrived(new.before + start, new.before + stop, 2 * window)
        carried = (*carried[:2], _weighed(carried[2], weights, fresh, inside))
    done = whole & (block >= 1)
    if not rule.looks or bool(done.any()):
        carried = evict((k, v), carried, filters, block, held, done, rule)
    if len(carried) == 3:
        carried = (*carried[:2], torch.where(whole[:, None, None], carried[2] * rule.memory, carried[2]))
    return o, carried


def _arrived(first: Tensor, end: Tensor, size: int) -> Tensor:
    """Bool [B,2w]: the ring's columns that hold a rank of first .. end - 1, both [B]."""
    last = end[:, None] - 1
    rank = last - (last - torch.arange(size, device=end.device)) % size
    return (rank >= first[:, None]) & (end > first)[:, None]


def _weighed(mass: Tensor, weights: Tensor, fresh: Tensor, inside: Tensor) -> Tensor:
    """mass [B,G,C+2w] and what the queries `inside` [B,W] add to it; columns of fresh [B,2w] tokens start at 0."""
    places = mass.shape[2] - fresh.shape[1]
    old = torch.cat([torch.zeros_like(fresh[:, :1]).expand(-1, places), fresh], 1)
    added = torch.where(inside[:, None, None, :, None], weights, 0.0).sum(dim=(2, 3))
    return mass.masked_fill(old[:, None], 0.0) + added


def _read(
    q: Tensor, ring: Tensors, kept: Tensors, held: Tensor, place: Tensor, block: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B,W,H,d] at `place` [B,W] of its block over the first `held` [B] of those kept [B,G,C,..] and the ring
    [B,2w,G,..]: (o [B,W,H,dv], the weights [B,G,H/G,W,C+2w] without gradients)."""
    batch, width, heads, head_dim = q.shape
    kv_heads, window, places = ring[0].shape[2], ring[0].shape[1] // 2, kept[0].shape[2]
    dtype = accumulation_dtype(q.dtype)
    column = torch.arange(2 * window, device=q.device)
    own = (torch.div(column, window, rounding_mode="floor") == (block % 2)[:, None])[:, None]
    near = (own & (column % window <= place[:, :, None])) | (~own & (block >= 1)[:, None, None])
    far = (torch.arange(places, device=q.device) < held[:, None])[:, None].expand(-1, width, -1)
    keys, values = (torch.cat([old, x.transpose(1, 2)], 2).to(dtype) for old, x in zip(kept[:2], ring, strict=True))
    folded = (q.to(dtype) * scale).reshape(batch, width, kv_heads, heads // kv_heads, head_dim).permute(0, 2, 3, 1, 4)
    scores = folded @ keys.transpose(-1, -2).unsqueeze(2)
    seen = torch.cat([far, near], -1)[:, None, None]
    weights = torch.softmax(scores.masked_fill(~seen, float("-inf")), dim=-1)
    o = weights @ values.unsqueeze(2)
    return o.permute(0, 3, 1, 2, 4).reshape(batch, width, heads, values.shape[3]), weights.detach()


def evict(
    ring: Tensors, carried: Tensors, filters: Tensors, block: Tensor, held: Tensor, done: Tensor, rule: Rule
) -> Tensors:
    """Where `done` [B], the block before `block` joins those kept, and the C best of them stay."""
    window, places = rule.window, carried[0].shape[2]
    odd = block % 2 == 1
    left = [torch.where(odd[:, None, None, None], x[:, :window], x[:, window:]).transpose(1, 2) for x in ring]
    items = [torch.cat([old, x], 2) for old, x in zip(carried[:2], left, strict=True)]
    mass: list[Tensor] = []
    if len(carried) == 3:
        first, second = carried[2][..., places : places + window], carried[2][..., places + window :]
        mass = [torch.cat([carried[2][..., :places], torch.where(odd[:, None, None], first, second)], -1)]
    scores = mass[0] if mass else (items[0].to(filters[0].dtype) * filters[0][:, None]).sum(-1)
    exists = torch.arange(places + window, device=block.device)
    exists = (exists < held[:, None]) | (exists >= places)
    index, count = stay(scores.detach(), exists[:, None].expand(scores.shape), places, rule.sinks)
    filled = torch.arange(places, device=block.device) < count
    chosen = [
        torch.where(filled[..., None], x.gather(2, index[..., None].expand(-1, -1, -1, x.shape[3])), 0.0) for x in items
    ]
    after = [torch.where(done[:, None, None, None], x, old) for x, old in zip(chosen, carried, strict=False)]
    if mass:
        best = torch.cat([torch.where(filled, mass[0].gather(2, index), 0.0), carried[2][..., places:]], -1)
        after.append(torch.where(done[:, None, None], best, carried[2]))
    return tuple(after)


def stay(scores: Tensor, exists: Tensor, places: int, sinks: int) -> tuple[Tensor, Tensor]:
    """(the indices [..,C] of the `places` items that stay, in order, and how many there are [..,1]): scores [..,L],
    exists [..,L]."""
    sink = exists & (torch.cumsum(exists.to(torch.int64), -1) <= sinks)
    scores = coarse(scores).masked_fill(sink, float("inf")).masked_fill(~exists, float("-inf"))
    index = torch.arange(scores.shape[-1], device=scores.device)
    mine, other = scores.unsqueeze(-1), scores.unsqueeze(-2)
    better = (other > mine) | ((other == mine) & (index > index[:, None]))
    stays = exists & ((better & exists.unsqueeze(-2)).sum(-1) < places)
    target = torch.where(stays, torch.cumsum(stays.to(torch.int64), -1) - 1, places)
    chosen = torch.zeros_like(target)[..., : places + 1]
    chosen = chosen.scatter(-1, target, index.expand(target.shape))[..., :places]
    return chosen, stays.sum(-1, keepdim=True)


def check_evict(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    before: Tensor,
    ring: tuple[Tensor, Tensor],
    kept: tuple[Tensor, Tensor],
    mass: Tensor | None,
    filters: Tensor | None,
    window: int,
    sinks: int,
) -> None:
    """Raise `OperatorError` unless heads, ring and what is kept fit together."""
    name = "evict_chunk"
    check_blocks(name, q, k, v, mask, before, ring, window)
    held, places = ring[0].shape[1], kept[0].shape[2]
    require(kept[1].shape[2] == places >= max(1, sinks), name, f"{places} places are too few to keep {sinks} sinks")
    require((mass is None) != (filters is None), name, "give mass or filters, not both")
    require(mass is None or mass.shape[2] == places + held, name, f"mass must be a float of [B,G,{places + held}]")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    before: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    mass: Tensor | None = None,
    filters: Tensor | None = None,
    *,
    window: int,
    scale: float,
    sinks: int = 0,
    memory: float = 0.0,
) -> Outputs:
    check_evict(q, k, v, mask, before, (ring_k, ring_v), (kept_k, kept_v), mass, filters, window, sinks)
    states = tuple(x.new_empty(x.shape) for x in (ring_k, ring_v, kept_k, kept_v))
    size = 0 if mass is None else mass.shape[2]
    weights = kept_k.new_empty(*kept_k.shape[:2], size, dtype=accumulation_dtype(q.dtype))
    return (q.new_empty(*q.shape[:3], v.shape[3]), *states, weights)  # type: ignore[return-value]


EVICT_CHUNK = define_operator(
    SCHEMA,
    fake=_fake,
    reference=evict_chunk_decomposed,
    recurrence=evict_chunk_recurrence,
    streamed=evict_chunk_decomposed,
)
evict_chunk = EVICT_CHUNK.overload
