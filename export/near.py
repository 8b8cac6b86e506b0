"""`hybrid_ring` over the standard operator Attention (opset 23): window, ring and left padding in one node.

The ring and the sinks are its past, the new tokens its keys and values, and one mask, the same for all layers with
that window, says what each query sees:

    past [ sinks (m) | ring (w) ]  new (T)      query i sees sinks that were filled before this call, the w keys of its
                                                window, and new tokens of rank < m, which are sinks already

What it gives besides o: the keys and values joined, of which the last w are the new ring; and the weights p. With one
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

from linearize.ops.hybrid import hybrid_chunk_decomposed, window_keys
from linearize.ops.hybrid_ring import Outputs, over

SCORES, PROBABILITIES = 0, 3  # qk_matmul_output_mode; in onnxruntime 1.31 modes 1 and 2 are not the standard's
Emit = Callable[..., list[Tensor]]
# (fq [B,T,H,F], fk [B,T,G,F], v [B,T,G,dv], s0, z0) -> sums [B,T,H,dv] and [B,T,H,1], new s [B,G,F,dv] and z [B,G,F]
Far = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor, Tensor]]


class Near(NamedTuple):
    """o [B,T,H,dv], its weights or scores p [B,H,T,m+w+T], the joined keys and values [B,G,m+w+T,d], the mask
    [B,1,T,m+w+T] as 0 and -inf, and which queries see anything, bool [B,1,T,1]."""

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
        last = slice(first + window, None)
        new_k, new_v = (
            write_sinks(sink, x[:, :, last], mask, positions) if sink is not None else k[:, :0].clone()
            for sink, x in ((sink_k, near.keys), (sink_v, near.values))
        )
        kept = (near.keys[:, :, -window:], near.values[:, :, -window:])
        counted = torch.cat([ring_mask, mask if sink_k is None else mask & (positions >= first)], 1)
        new_ring = (*(x.transpose(1, 2) for x in kept), counted[:, -window:])
        if query_map is None or key_map is None or s0 is None or z0 is None:
            o = near.o if sink_logits is None else near.o * share_of_keys(near.p + near.bias, sink_logits)
            o = torch.where(near.any_seen.transpose(1, 2), o, 0.0)
            return (o, *new_ring, new_k, new_v, q.new_zeros(q.shape[0], k.shape[2], 0, v.shape[3]),
                    q.new_zeros(q.shape[0], k.shape[2], 0))  # fmt: skip
        left = slice(first, first + length)
        fq = hedgehog(q.transpose(1, 2), query_map)
        fk = hedgehog(near.keys[:, :, left], key_map, counted[:, None, :length, None, None].to(q.dtype))
        above, below, s, z = far(fq, fk, near.values[:, :, left].transpose(1, 2), s0, z0)
        u = near.p.amax(dim=-1, keepdim=True).transpose(1, 2)
        u = u if omega is None else u * torch.exp(-omega)[:, None]
        o = (near.o + u * above) / (1 + u * below)
        return (torch.where(near.any_seen.transpose(1, 2), o, 0.0), *new_ring, new_k, new_v, s, z)

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
    seen = window_keys(length, window, q.device)
    if sink_k is None or sink_v is None:
        seen = seen & torch.cat([ring[2], mask], 1)[:, None]
    else:
        first = sink_k.shape[1]
        past = [torch.cat([sink.transpose(1, 2), x], 2) for sink, x in zip((sink_k, sink_v), past, strict=True)]
        seen = _seen_with_sinks(seen, mask, positions, ring[2], first)
    bias = torch.where(seen, 0.0, float("-inf"))[:, None]
    packed = [x.reshape(batch, length, x.shape[2] * x.shape[3]) for x in (q, k, v)]
    total = first + window + length
    shapes = [(batch, length, heads * value_dim), (batch, kv_heads, total, dim), (batch, kv_heads, total, value_dim),
              (batch, heads, length, total)]  # fmt: skip
    attributes = {"q_num_heads": heads, "kv_num_heads": kv_heads, "scale": float(scale),
                  "qk_matmul_output_mode": mode}  # fmt: skip
    o, keys, values, p = emit("Attention", [*packed, bias, *past], attributes, shapes)
    any_seen = seen.any(dim=-1, keepdim=True)[:, None]
    return Near(o.reshape(batch, length, heads, value_dim), p, keys, values, bias, any_seen)


def _seen_with_sinks(near: Tensor, mask: Tensor, positions: Tensor, ring_mask: Tensor, first: int) -> Tensor:
    """near bool [T,w+T] -> [B,T,m+w+T]."""
    length = mask.shape[1]
    is_sink = mask & (positions < first)
    before = positions[:, -1:] - mask.sum(dim=1, keepdim=True)  # rank of the last token before this call
    filled = torch.arange(first, device=mask.device) <= before
    in_window = near & torch.cat([ring_mask, mask & ~is_sink], 1)[:, None]
    t = torch.arange(length, device=mask.device)
    as_sink = torch.cat([torch.zeros_like(ring_mask), is_sink], 1)[:, None]
    causal = torch.arange(ring_mask.shape[1] + length, device=mask.device) <= t[:, None] + ring_mask.shape[1]
    return torch.cat([filled[:, None].expand(-1, length, -1), in_window | (as_sink & causal)], 2)


def share_of_keys(scores: Tensor, sink_logits: Tensor) -> Tensor:
    """[B,T,H,1]: how much of the denominator is the keys', masked scores [B,H,T,J], sink_logits [H,n]."""
    keys = torch.logsumexp(scores, dim=-1, keepdim=True)
    return torch.sigmoid(keys - torch.logsumexp(sink_logits, dim=-1)[:, None, None]).transpose(1, 2)


def write_sinks(sink: Tensor, new: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
    """sink [B,m,G,d] with the new tokens [B,G,T,d] of rank s written to slot s."""
    order = torch.arange(sink.shape[1], device=new.device)
    writes = ((positions[:, :, None] == order) & mask[:, :, None]).to(new.dtype).transpose(1, 2)[:, None]
    return (sink.transpose(1, 2) + writes @ new).transpose(1, 2)


def hedgehog(x: Tensor, weight: Tensor, mask: Tensor | None = None) -> Tensor:
    """[B,heads,T,d], [heads,d,f] -> [softmax(x W) ; softmax(-x W)], [B,T,heads,2f], times mask [B,1,T,1,1]: one product
    and one softmax."""
    batch, heads, length, _ = x.shape
    both = x @ torch.cat([weight, -weight], dim=-1)
    features = torch.softmax(both.reshape(batch, heads, length, 2, weight.shape[2]), dim=-1)
    features = features if mask is None else features * mask
    return features.permute(0, 2, 1, 3, 4).reshape(batch, length, heads, 2 * weight.shape[2])


def far_by_sums(fq: Tensor, fk: Tensor, v: Tensor, s0: Tensor, z0: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
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
    above, below = (x.reshape(batch, heads, length, -1).transpose(1, 2) for x in (above, below))
    return above, below, s, z

