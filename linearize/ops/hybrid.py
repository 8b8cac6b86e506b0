"""`linearize::hybrid_chunk`, sliding-window softmax and a linear far field under one denominator, over a delay line.

        c_h ( sum_{j in W(i)} e^{s_ij - m_i} v_j + sum_{sinks} e^{s_ij - m_i} v_j ) + sum_{j left W(i)} (fq_i.fk_j) v_j
  o_i = -------------------------------------------------------------------------------------------------------------
        c_h ( sum_{j in W(i)} e^{s_ij - m_i}     + sum_{sinks} e^{s_ij - m_i}     ) + sum_{j left W(i)}  fq_i.fk_j

    s_ij = scale q_i.k_j,  m_i = max of s_ij over the attended window keys and sinks (logits included)

LoLCATs' hybrid (Zhang et al. 2024, eq. 6), with the state at kv heads. The linear sums are not divided by e^{m_i}, so
m_i is part of the function: every form uses this maximum. 0 where nothing is attended and the far mass is 0.

Delay line: k [B,w+T,G,d] and v [B,w+T,G,dv] are the w keys and values before the call, then the T new ones;
mask [B,w+T] is True where a key exists. Query i stands at index w + i, its window is i+1..w+i (w keys, itself among
them), and index i has just left it: it joins the state s [B,G,F,dv] = sum fk v^T, z [B,G,F] = sum fk, before query i
reads it. fq [B,T,H,F] are features of the queries, fk [B,T,G,F] of the leaving keys (indices 0..T-1; those that the
mask denies count as zero). fq = fk = None is pure window attention and leaves s and z with F = 0.

Sinks: sink_k [B,m,G,d], sink_v [B,m,G,dv] under sink_mask [B,T,m] are further keys of the softmax;
sink_logits [H,n] count in the denominator only. mix [H] is c (None = 1). q [B,T,H,d]; o [B,T,H,dv] in q's dtype;
states in float32, or float64 for float64 inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._library import accumulation_dtype, define_operator, require

SCHEMA = (
    "hybrid_chunk(Tensor q, Tensor k, Tensor v, Tensor mask, Tensor? fq=None, Tensor? fk=None, Tensor? mix=None, "
    "Tensor? sink_k=None, Tensor? sink_v=None, Tensor? sink_mask=None, Tensor? sink_logits=None, "
    "Tensor? s0=None, Tensor? z0=None, *, int window, float scale) -> (Tensor o, Tensor s, Tensor z)"
)
PIECE = 64
States = tuple[Tensor, Tensor, Tensor]


def hybrid_chunk_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    fq: Tensor | None = None,
    fk: Tensor | None = None,
    mix: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
    s0: Tensor | None = None,
    z0: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> States:
    """The truth: one token at a time; the leaving token joins the state, then the query reads window and state."""
    length, heads = q.shape[1], q.shape[2]
    group = heads // k.shape[2]
    out_dtype, dtype = q.dtype, accumulation_dtype(q.dtype)
    s, z = initial_states(q, v, k.shape[2], fk, s0, z0)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    c = torch.ones(heads, dtype=dtype) if mix is None else mix.to(dtype)
    outputs = []
    for i in range(length):
        near_k, near_v, seen = (x[:, i + 1 : window + i + 1] for x in (k, v, mask))
        if sink_k is not None and sink_v is not None and sink_mask is not None:
            near_k, near_v = torch.cat([sink_k.to(dtype), near_k], 1), torch.cat([sink_v.to(dtype), near_v], 1)
            seen = torch.cat([sink_mask[:, i], seen], 1)
        near_k, near_v = (x.repeat_interleave(group, dim=2) for x in (near_k, near_v))
        scores = scale * torch.einsum("bhd,bjhd->bhj", q[:, i], near_k)
        scores = scores.masked_fill(~seen[:, None], float("-inf"))
        if sink_logits is not None:
            logits = sink_logits.to(dtype).expand(q.shape[0], -1, -1)
            scores = torch.cat([scores, logits], dim=-1)
        top = scores.amax(dim=-1, keepdim=True)
        p = torch.exp(scores - torch.where(top == float("-inf"), 0.0, top))
        above = c[:, None] * torch.einsum("bhj,bjhv->bhv", p[..., : near_v.shape[1]], near_v)
        below = c * p.sum(dim=-1)
        if fq is not None and fk is not None:
            leaving = fk[:, i].to(dtype) * mask[:, i, None, None]
            s = s + leaving[..., None] * v[:, i, :, None, :]
            z = z + leaving
            reader = fq[:, i].to(dtype)
            above = above + torch.einsum("bhf,bhfv->bhv", reader, s.repeat_interleave(group, dim=1))
            below = below + torch.einsum("bhf,bhf->bh", reader, z.repeat_interleave(group, dim=1))
        outputs.append(above / torch.where(below == 0, 1.0, below)[..., None])
    return torch.stack(outputs, dim=1).to(out_dtype), s, z


def hybrid_chunk_decomposed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    fq: Tensor | None = None,
    fk: Tensor | None = None,
    mix: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
    s0: Tensor | None = None,
    z0: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> States:
    """Standard operators, no loop, T dynamic; holds the scores [B,H,T,w+T], so long inputs are fed in pieces."""
    batch, length, heads, _ = q.shape
    kv_heads, value_dim = k.shape[2], v.shape[3]
    dtype = accumulation_dtype(q.dtype)
    seen = window_keys(length, window, q.device) & mask[:, None]
    near_k, near_v = k, v
    if sink_k is not None and sink_v is not None and sink_mask is not None:
        near_k, near_v = torch.cat([sink_k, k], dim=1), torch.cat([sink_v, v], dim=1)
        seen = torch.cat([sink_mask, seen], dim=-1)
    folded = fold_heads(q.to(dtype) * scale, kv_heads)
    scores = folded @ near_k.to(dtype).permute(0, 2, 3, 1)
    scores = scores.reshape(batch, kv_heads, heads // kv_heads, length, near_k.shape[1])
    weights, below = soften(scores.masked_fill(~seen[:, None, None], float("-inf")), sink_logits, mix)
    weights = weights.reshape(batch, kv_heads, heads // kv_heads * length, near_k.shape[1])
    above = weights @ near_v.to(dtype).permute(0, 2, 1, 3)
    below = below.reshape(batch, kv_heads, heads // kv_heads * length, 1)
    if fq is None or fk is None:
        s, z = initial_states(q, v, kv_heads, fk, s0, z0)
    else:
        far_above, far_below, s, z = _far(fq, fk, v[:, :length], mask[:, :length], s0, z0)
        above, below = above + far_above, below + far_below
    o = above / below.masked_fill(below == 0, 1.0)
    o = o.reshape(batch, heads, length, value_dim).transpose(1, 2)
    return o.to(q.dtype).contiguous(), s.contiguous(), z.contiguous()


def hybrid_chunk_streamed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    fq: Tensor | None = None,
    fk: Tensor | None = None,
    mix: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
    s0: Tensor | None = None,
    z0: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> States:
    """The decomposed form, `PIECE` tokens at a time, ring and states carried: memory linear in T."""
    length, outputs, states = q.shape[1], [], (s0, z0)
    for start in range(0, length, PIECE):
        stop = min(start + PIECE, length)
        new, line = slice(start, stop), slice(start, stop + window)
        features = (None, None) if fq is None or fk is None else (fq[:, new], fk[:, new])
        sinks = (sink_k, sink_v, None if sink_mask is None else sink_mask[:, new], sink_logits)
        inputs = (q[:, new], k[:, line], v[:, line], mask[:, line], *features, mix, *sinks, *states)
        o, s, z = hybrid_chunk_decomposed(*inputs, window=window, scale=scale)
        outputs.append(o)
        states = s, z
    return torch.cat(outputs, dim=1), s, z


def soften(scores: Tensor, sink_logits: Tensor | None, mix: Tensor | None) -> tuple[Tensor, Tensor]:
    """scores [B,G,R,T,J] -> (weights c e^{s - m} of the same shape, their sum with the sink logits' [B,G,R,T,1])."""
    kv_heads, group = scores.shape[1], scores.shape[2]
    top = scores.amax(dim=-1, keepdim=True)
    logits = None
    if sink_logits is not None:
        logits = sink_logits.to(scores.dtype).reshape(kv_heads, group, 1, sink_logits.shape[1])
        top = torch.maximum(top, logits.amax(dim=-1, keepdim=True))
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    if logits is not None:
        total = total + torch.exp(logits - top).sum(dim=-1, keepdim=True)
    if mix is None:
        return weights, total
    c = mix.to(scores.dtype).reshape(kv_heads, group, 1, 1)
    return weights * c, total * c


def _far(
    fq: Tensor, fk: Tensor, v: Tensor, mask: Tensor, s0: Tensor | None, z0: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Linear attention of fq over the leaving tokens and the state: (above, below) [B,G,R*T,..], then s and z."""
    batch, length, heads, _ = fq.shape
    kv_heads = fk.shape[2]
    rows = heads // kv_heads * length
    dtype = accumulation_dtype(fq.dtype)
    reader = fold_heads(fq.to(dtype), kv_heads)
    writer = (fk.to(dtype) * mask[:, :, None, None]).permute(0, 2, 1, 3)
    values = v.to(dtype).permute(0, 2, 1, 3)
    t = torch.arange(length, device=fq.device)
    weights = (reader @ writer.transpose(-1, -2)).reshape(batch, kv_heads, heads // kv_heads, length, length)
    weights = weights.masked_fill(t[:, None] < t[None, :], 0.0).reshape(batch, kv_heads, rows, length)
    above, below = weights @ values, weights.sum(dim=-1, keepdim=True)
    s, z = writer.transpose(-1, -2) @ values, writer.sum(dim=2)
    if s0 is not None:
        above, s = above + reader @ s0.to(dtype), s + s0.to(dtype)
    if z0 is not None:
        below, z = below + reader @ z0.to(dtype)[..., None], z + z0.to(dtype)
    return above, below, s, z


def fold_heads(x: Tensor, kv_heads: int) -> Tensor:
    """[B,T,H,d] -> [B,G,R*T,d]: the query heads of a kv head become rows."""
    batch, length, heads, dim = x.shape
    x = x.reshape(batch, length, kv_heads, heads // kv_heads, dim).permute(0, 2, 3, 1, 4)
    return x.reshape(batch, kv_heads, heads // kv_heads * length, dim)


def window_keys(length: int, window: int, device: torch.device) -> Tensor:
    """Bool [T,w+T]: query i sees indices i+1..w+i of the delay line."""
    i = torch.arange(length, device=device)[:, None]
    j = torch.arange(length + window, device=device)[None, :]
    return (j > i) & (j <= i + window)


def initial_states(
    q: Tensor, v: Tensor, kv_heads: int, fk: Tensor | None, s0: Tensor | None, z0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Copies of s0 and z0, zeros where they are None; F = 0 without features."""
    dtype = accumulation_dtype(q.dtype)
    features = 0 if fk is None else fk.shape[3]
    if s0 is None or fk is None:
        s = q.new_zeros(q.shape[0], kv_heads, features, v.shape[3], dtype=dtype)
    else:
        s = s0.to(dtype, copy=True)
    if z0 is None or fk is None:
        return s, q.new_zeros(q.shape[0], kv_heads, features, dtype=dtype)
    return s, z0.to(dtype, copy=True)


def check_hybrid(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    features: tuple[Tensor | None, Tensor | None],
    sinks: tuple[Tensor | None, Tensor | None, Tensor | None],
    window: int,
) -> None:
    """Raise `OperatorError` unless heads and the delay line's length fit together."""
    name, length, heads, kv_heads = "hybrid_chunk", q.shape[1], q.shape[2], k.shape[2]
    require(window >= 1, name, f"window is {window}, needs at least 1")
    require(heads % kv_heads == 0, name, f"{heads} query heads are no multiple of {kv_heads} kv heads")
    require(k.shape[1] == length + window, name, f"k holds {k.shape[1]} keys, not window + T = {window} + {length}")
    require(k.shape[:3] == v.shape[:3], name, "k and v differ in [B,w+T,G]")
    require(mask.shape[1] == k.shape[1] and mask.dtype == torch.bool, name, "mask must be a bool of [B,w+T]")
    require((features[0] is None) == (features[1] is None), name, "give both fq and fk, or neither")
    given = sum(x is not None for x in sinks)
    require(given in (0, 3), name, "give all of sink_k, sink_v and sink_mask, or none")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    fq: Tensor | None = None,
    fk: Tensor | None = None,
    mix: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_mask: Tensor | None = None,
    sink_logits: Tensor | None = None,
    s0: Tensor | None = None,
    z0: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> States:
    check_hybrid(q, k, v, mask, (fq, fk), (sink_k, sink_v, sink_mask), window)
    batch, length, heads, _ = q.shape
    dtype, features = accumulation_dtype(q.dtype), 0 if fk is None else fk.shape[3]
    s = q.new_empty(batch, k.shape[2], features, v.shape[3], dtype=dtype)
    return q.new_empty(batch, length, heads, v.shape[3]), s, q.new_empty(batch, k.shape[2], features, dtype=dtype)


HYBRID_CHUNK = define_operator(
    SCHEMA,
    fake=_fake,
    reference=hybrid_chunk_decomposed,
    recurrence=hybrid_chunk_recurrence,
    streamed=hybrid_chunk_streamed,
)
hybrid_chunk = HYBRID_CHUNK.overload
