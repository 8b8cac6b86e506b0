"""`linearize::hybrid_ring`: `hybrid_chunk` with its delay line, sinks and Hedgehog features, one operator a layer.

The w keys and values before the call, ring_k [B,w,G,d], ring_v [B,w,G,dv] and ring_mask [B,w] (which exist), become a
delay line with the T new ones k [B,T,G,d], v [B,T,G,dv], mask bool [B,T]; its last w entries are the new ring. q
[B,T,H,d]; `positions` int64 [B,T] are the tokens' ranks in their rows. With sinks sink_k [B,m,G,d], sink_v [B,m,G,dv]
the tokens of rank below m are written to them, are attended to for ever, and are hidden from window and far field.

With query_map [H,d,f] and key_map [G,d,f] the far field reads phi(q), phi(k), F = 2f (Zhang et al. 2024, Hedgehog):

    phi(x) = [softmax(x W) ; softmax(-x W)]

and s0 [B,G,2f,dv], z0 [B,G,2f] hold what left the window; omega [H] is log c. sink_logits [H,n] count in the
denominator alone. Formulas, dtypes and what stands where nothing is seen: `linearize.ops.hybrid`. o is [B,T,H,dv];
without sinks the new sink_k, sink_v have m = 0, without maps s and z have F = 0.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearize.ops._library import accumulation_dtype, define_operator, require
from linearize.ops.hybrid import (
    States,
    hybrid_chunk,
    hybrid_chunk_decomposed,
    hybrid_chunk_recurrence,
    hybrid_chunk_streamed,
)

SCHEMA = (
    "hybrid_ring(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor positions, Tensor ring_k, Tensor ring_v, "
    "Tensor ring_mask, Tensor? sink_k=None, Tensor? sink_v=None, Tensor? query_map=None, Tensor? key_map=None, "
    "Tensor? omega=None, Tensor? sink_logits=None, Tensor? s0=None, Tensor? z0=None, *, int window, float scale) -> "
    "(Tensor o, Tensor ring_k, Tensor ring_v, Tensor ring_mask, Tensor sink_k, Tensor sink_v, Tensor s, Tensor z)"
)
Outputs = tuple[Tensor, ...]


def over(chunk: Callable[..., States]) -> Callable[..., Outputs]:
    """The operator over one form of `hybrid_chunk`."""

    def hybrid_ring(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor,
        positions: Tensor,
        ring_k: Tensor,
        ring_v: Tensor,
        ring_mask: Tensor,
        sink_k: Tensor | None = None,
        sink_v: Tensor | None = None,
        query_map: Tensor | None = None,
        key_map: Tensor | None = None,
        omega: Tensor | None = None,
        sink_logits: Tensor | None = None,
        s0: Tensor | None = None,
        z0: Tensor | None = None,
        *,
        window: int,
        scale: float,
    ) -> Outputs:
        check_ring(
            q, k, v, mask, positions, (ring_k, ring_v, ring_mask), (sink_k, sink_v), (query_map, key_map), window
        )
        new_k, new_v, sink_mask, counted = join_sinks(k, v, mask, positions, sink_k, sink_v)
        line_k, line_v = torch.cat([ring_k, k], 1), torch.cat([ring_v, v], 1)
        line_mask = torch.cat([ring_mask, counted], 1)
        features: tuple[Tensor | None, Tensor | None] = (None, None)
        if query_map is not None and key_map is not None:
            features = hedgehog(q, query_map), hedgehog(line_k[:, :-window], key_map)
        c = None if omega is None else torch.exp(omega)
        sinks = (None, None) if sink_k is None else (new_k, new_v)
        o, s, z = chunk(
            q, line_k, line_v, line_mask, *features, c, *sinks, sink_mask, sink_logits, s0, z0,
            window=window, scale=scale,
        )  # fmt: skip
        ring = (x[:, -window:].clone() for x in (line_k, line_v, line_mask))
        return (o, *ring, new_k, new_v, s, z)

    return hybrid_ring


def join_sinks(
    k: Tensor, v: Tensor, mask: Tensor, positions: Tensor, sink_k: Tensor | None, sink_v: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """The sinks after the tokens, which of them each token sees [B,T,m], and the tokens that enter the window [B,T]."""
    if sink_k is None or sink_v is None:
        return k[:, :0].clone(), v[:, :0].clone(), None, mask
    order = torch.arange(sink_k.shape[1], device=k.device)
    ranks = positions.unsqueeze(-1)
    writes = ((ranks == order) & mask.unsqueeze(-1)).to(k.dtype).transpose(1, 2).unsqueeze(1)
    new_k, new_v = (sink + (writes @ x.transpose(1, 2)).transpose(1, 2) for sink, x in ((sink_k, k), (sink_v, v)))
    return new_k, new_v, ranks >= order, mask & (positions >= sink_k.shape[1])


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """[B,T,heads,d], [heads,d,f] -> [B,T,heads,2f]: positive features that sum to 2."""
    projected = (x.to(weight.dtype).transpose(1, 2) @ weight).transpose(1, 2)
    return torch.cat([torch.softmax(projected, dim=-1), torch.softmax(-projected, dim=-1)], dim=-1)


def check_ring(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    positions: Tensor,
    ring: tuple[Tensor, Tensor, Tensor],
    sinks: tuple[Tensor | None, Tensor | None],
    maps: tuple[Tensor | None, Tensor | None],
    window: int,
) -> None:
    """Raise `OperatorError` unless heads, tokens and ring fit together."""
    name, heads, kv_heads = "hybrid_ring", q.shape[2], k.shape[2]
    require(window >= 1, name, f"window is {window}, needs at least 1")
    require(heads % kv_heads == 0, name, f"{heads} query heads are no multiple of {kv_heads} kv heads")
    require(k.shape[:3] == v.shape[:3], name, "k and v differ in [B,T,G]")
    require(mask.shape == positions.shape == q.shape[:2], name, "mask and positions must be [B,T]")
    require(mask.dtype == torch.bool == ring[2].dtype, name, "mask and ring_mask must be bool")
    for held in ring:
        require(held.shape[1] == window, name, f"the ring holds {held.shape[1]} tokens, not {window}")
    require((sinks[0] is None) == (sinks[1] is None), name, "give both sink_k and sink_v, or neither")
    require((maps[0] is None) == (maps[1] is None), name, "give both query_map and key_map, or neither")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    positions: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_mask: Tensor,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    query_map: Tensor | None = None,
    key_map: Tensor | None = None,
    omega: Tensor | None = None,
    sink_logits: Tensor | None = None,
    s0: Tensor | None = None,
    z0: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> Outputs:
    check_ring(q, k, v, mask, positions, (ring_k, ring_v, ring_mask), (sink_k, sink_v), (query_map, key_map), window)
    batch, length, heads, _ = q.shape
    kv_heads, value_dim, dtype = k.shape[2], v.shape[3], accumulation_dtype(q.dtype)
    width = 0 if key_map is None else 2 * key_map.shape[2]
    return (
        q.new_empty(batch, length, heads, value_dim),
        ring_k.new_empty(ring_k.shape),
        ring_v.new_empty(ring_v.shape),
        ring_mask.new_empty(ring_mask.shape),
        k.new_empty(batch, 0 if sink_k is None else sink_k.shape[1], kv_heads, k.shape[3]),
        v.new_empty(batch, 0 if sink_v is None else sink_v.shape[1], kv_heads, value_dim),
        q.new_empty(batch, kv_heads, width, value_dim, dtype=dtype),
        q.new_empty(batch, kv_heads, width, dtype=dtype),
    )


def _operator(*args: Any, **keywords: Any) -> States:
    outputs: States = hybrid_chunk(*args, **keywords)
    return outputs


HYBRID_RING = define_operator(
    SCHEMA,
    fake=_fake,
    reference=over(hybrid_chunk_decomposed),
    recurrence=over(hybrid_chunk_recurrence),
    streamed=over(hybrid_chunk_streamed),
    composed=over(_operator),
)
hybrid_ring = HYBRID_RING.overload
