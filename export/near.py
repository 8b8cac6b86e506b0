"""`hybrid_ring` over the standard operator Attention (opset 23): window, ring and left padding in one node.

The ring and the sinks are its past, the new tokens its keys and values, and one mask, the same for all layers with
that window, says what each query sees:

    past [ sinks (m) | ring (w) ]  new (T)      query i sees sinks that were filled before this call, the w keys of its
                                                window, and new tokens of rank < m, which are sinks already

What it gives besides o: the keys and values joined, of which the last w are the new ring; and the weights p. Sinks and
ring lie in one tensor between calls (`interface.py`), so that nothing is joined or cut at a step. With one
denominator for window and far field (LoLCATs), e^{s - m} sums to 1 / max p, as its largest entry is 1, so

    o = (o_near + u sum fq.fk v) / (1 + u sum fq.fk),    u = max p / c

Sink logits l in the denominator, where there is no far field (Lizard), scale o by sigmoid(log sum e^s - log sum e^l);
with one, the mixer takes standard operators throughout. A query that sees nothing (padding) gets 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from linearize.ops.hybrid import hybrid_chunk_decomposed
from linearize.ops.hybrid_ring import Outputs, over

SCORES, PROBABILITIES = 0, 3  # qk_matmul_output_mode; in onnxruntime 1.31 modes 1 and 2 are not the standard's
Emit = Callable[..., list[Tensor]]
# (fq [B,T,H,F], fk [B,T,G,F], v [B,T,G,dv], s0, z0, u [B,T,H,1]) -> u times both sums, [B,T,H,dv] and [B,T,H,1], and
# the new s [B,G,F,dv] and z [B,G,F]
Far = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


class Near(NamedTuple):
    """o [B,T,H,dv], its weights or scores p [B,H,T,m+w+T], the joined keys and values [B,G,m+w+T,d], the mask
    [B,1,T,m+w+T] as 0 and -inf, and which queries see anything, bool [B,T,1,1]."""

    o: Tensor
    p: Tensor
    keys: Tensor
    values: Tensor
    bias: Tensor
    any_seen: Tensor


def ring_by_attention(emit: Emit, far: Far) -> Callable[..., Outputs]:
    """The form of `hybrid_ring` that the exporter decomposes to."""
    by_parts = over(hybrid_chunk_decomposed)

    def hybrid_ring(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor, positions: Tensor, ring_k: Tensor, ring_v: Tensor,
        ring_mask: Tensor, sink_k: Tensor | None = None, sink_v: Tensor | None = None, query_map: Tensor | None = None,
        key_map: Tensor | None = None, omega: Tensor | None = None, sink_logits: Tensor | None = None,
        s0: Tensor | None = None, z0: Tensor | None = None, *, window: int, scale: float,
    ) -> Outputs:  # fmt: skip
        tokens, ring, sinks = (q, k, v, mask, positions), (ring_k, ring_v, ring_mask), (sink_k, sink_v)
        has_far = query_map is not None
        if sink_logits is not None and has_far:
            rest = (*sinks, query_map, key_map, omega, sink_logits, s0, z0)
            return by_parts(*tokens, *ring, *rest, window=window, scale=scale)
        near = attend(emit, tokens, ring, sinks, window, scale, PROBABILITIES if has_far else SCORES)
        length, first = q.shape[1], 0 if sink_k is None else sink_k.shape[1]
        kept = keep(emit, near, mask, positions, window, first)
        counted = torch.cat([ring_mask, mask if sink_k is None else mask & (positions >= first)], 1)
        new = [x[:, :, part].transpose(1, 2) for part in (slice(first, None), slice(0, first)) for x in kept]
        states = (*new[:2], counted[:, -window:], *new[2:])
        if query_map is None or key_map is None or s0 is None or z0 is None:
            o = near.o if sink_logits is None else near.o * share_of_keys(near.p + near.bias, sink_logits)
            o = torch.where(near.any_seen, o, 0.0)
            return (o, *states, q.new_zeros(q.shape[0], k.shape[2], 0, v.shape[3]),
                    q.new_zeros(q.shape[0], k.shape[2], 0))  # fmt: skip
        left_k, left_v = (x[:, :, first : first + length] for x in (near.keys, near.values))
        fq, fk = hedgehog(q, left_k, query_map, key_map, counted[:, :length])
        u = near.p.amax(dim=-1, keepdim=True).transpose(1, 2)
        u = u if omega is None else u * torch.exp(-omega)[:, None]
        above, below, s, z = far(fq, fk, left_v.transpose(1, 2), s0, z0, u)
        o = (near.o + above) / (1 + below)
        return (torch.where(near.any_seen, o, 0.0), *states, s, z)

    return hybrid_ring


def attend(
    emit: Emit, tokens: tuple[Tensor, ...], ring: tuple[Tensor, ...], sinks: tuple[Tensor | None, ...],
    window: int, scale: float, mode: int,
) -> Near:  # fmt: skip
    q, k, v, mask, positions = tokens
    batch, length, heads, dim = q.shape
    kv_heads, value_dim = k.shape[2], v.shape[3]
    past = [x.transpose(1, 2) for x in ring[:2]]
    first, (sink_k, sink_v) = 0, sinks
    if sink_k is not None and sink_v is not None:
        first = sink_k.shape[1]
        past = [torch.cat([sink.transpose(1, 2), x], 2) for sink, x in zip((sink_k, sink_v), past, strict=True)]
    bias = torch.where(seen_keys(mask, positions, ring[2], window, first), 0.0, float("-inf"))
    any_seen = (bias.amax(dim=-1, keepdim=True) == 0).unsqueeze(-1)
    bias = bias[:, None]
    packed = [x.reshape(batch, length, x.shape[2] * x.shape[3]) for x in (q, k, v)]
    total = first + window + length
    shapes = [(batch, length, heads * value_dim), (batch, kv_heads, total, dim), (batch, kv_heads, total, value_dim),
              (batch, heads, length, total)]  # fmt: skip
    attributes = {"q_num_heads": heads, "kv_num_heads": kv_heads, "scale": float(scale),
                  "qk_matmul_output_mode": mode}  # fmt: skip
    o, keys, values, p = emit("Attention", [*packed, bias, *past], attributes, shapes)
    return Near(o.reshape(batch, length, heads, value_dim), p, keys, values, bias, any_seen)


def seen_keys(mask: Tensor, positions: Tensor, ring_mask: Tensor, window: int, first: int) -> Tensor:
    """Bool [B,T,m+w+T]: keys that exist and are in a query's window, or sinks not after it."""
    length = mask.shape[1]
    t = torch.arange(length, device=mask.device)[:, None]
    index = torch.arange(-first, window + length, device=mask.device)  # in ring and new tokens; sinks are negative
    inside, past = index > t, index <= t + window
    if not first:
        return (inside & past) & torch.cat([ring_mask, mask], 1)[:, None]
    filled = torch.arange(first, device=mask.device) <= ranks(mask, positions)[0]
    never = ring_mask & ring_mask.new_zeros(1)
    exist = torch.cat([filled, ring_mask, mask], 1)
    are_sinks = torch.cat([filled, never, mask & (positions < first)], 1)
    return (inside | are_sinks[:, None]) & past & exist[:, None]


def ranks(mask: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Of a row's last token before this call and in it, int64 [B,1]."""
    last = positions[:, -1:]
    return last - mask.sum(dim=1, keepdim=True), last


def keep(emit: Emit, near: Near, mask: Tensor, positions: Tensor, window: int, first: int) -> list[Tensor]:
    """Keys and values [B,G,m+w,d] for the next call: sinks that are filled by now, then the last w.

    With sinks, all are taken by one GatherND each, whose indices are the same in all layers: sink s was filled before,
    or is the token of rank s, which stands last - s places before the end as padding is only left of the tokens.
    """
    if not first:
        return [x[:, :, -window:] for x in (near.keys, near.values)]
    batch, kv_heads, total = near.keys.shape[:3]
    before, last = ranks(mask, positions)
    slot = torch.arange(first + window, device=mask.device)
    is_new = (slot > before) & (slot <= last)
    sinks = torch.where(is_new, slot + (total - 1) - last, slot)
    index = torch.where(slot < first, sinks, slot + mask.shape[1])
    indices = index[:, None, :, None].expand(-1, kv_heads, -1, -1)
    shapes = [[(batch, kv_heads, first + window, x.shape[3])] for x in (near.keys, near.values)]
    return [emit("GatherND", [x, indices], {"batch_dims": 2}, shape)[0]
            for x, shape in zip((near.keys, near.values), shapes, strict=True)]  # fmt: skip


def share_of_keys(scores: Tensor, sink_logits: Tensor) -> Tensor:
    """[B,T,H,1]: how much of the denominator is the keys', masked scores [B,H,T,J], sink_logits [H,n]."""
    keys = torch.logsumexp(scores, dim=-1, keepdim=True)
    return torch.sigmoid(keys - torch.logsumexp(sink_logits, dim=-1)[:, None, None]).transpose(1, 2)


def hedgehog(
    q: Tensor, left: Tensor, query_map: Tensor, key_map: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """[softmax(x W) ; softmax(-x W)] of queries [B,T,H,d] and of the keys that leave the window [B,G,T,d], which count
    where mask [B,T] says: [B,T,H,2f] and [B,T,G,2f] by one product and one softmax."""
    batch, length, heads, _ = q.shape
    all_heads, width = heads + left.shape[1], query_map.shape[2]
    x = torch.cat([q.transpose(1, 2), left], dim=1)
    product = (x @ torch.cat([query_map, key_map])).transpose(1, 2)
    both = torch.cat([product, -product], dim=-1).reshape(batch, length, all_heads, 2, width)
    features = torch.softmax(both, dim=-1).reshape(batch, length, all_heads * 2 * width)
    fq, fk = features.split([heads * 2 * width, left.shape[1] * 2 * width], dim=-1)
    fk = fk * mask[:, :, None].to(q.dtype)
    return fq.reshape(batch, length, heads, 2 * width), fk.reshape(batch, length, left.shape[1], 2 * width)


def far_by_sums(
    fq: Tensor, fk: Tensor, v: Tensor, s0: Tensor, z0: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """In standard operators, quadratic in T."""
    batch, length, heads, width = fq.shape
    kv_heads = v.shape[2]
    reader = fq.reshape(batch, length, kv_heads, heads // kv_heads, width).permute(0, 2, 3, 1, 4)
    reader = reader.reshape(batch, kv_heads, heads // kv_heads * length, width)
    writer, values = fk.permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
    t = torch.arange(length, device=fq.device)
    weights = (reader @ writer.transpose(-1, -2)).reshape(batch, kv_heads, heads // kv_heads, length, length)
    weights = weights.masked_fill(t[:, None] < t, 0.0).reshape(batch, kv_heads, heads // kv_heads * length, length)
    above = weights @ values + reader @ s0
    below = weights.sum(dim=-1, keepdim=True) + reader @ z0[..., None]
    s, z = s0 + writer.transpose(-1, -2) @ values, z0 + writer.sum(dim=2)
    above, below = (u * x.reshape(batch, heads, length, -1).transpose(1, 2) for x in (above, below))
    return above, below, s, z

