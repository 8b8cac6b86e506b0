"""`linearize::hybrid_step`: one token a row of `hybrid_chunk`, rings updated in place, states once a window.

The token of rank p (`pos` [B] int64, a row's real tokens before it) enters the rings at p % 2w; query p then reads

    W(p) = p-w+1 .. p           softmax, with the sinks and the sink logits (`linearize.ops.hybrid` has the formula)
    F(p) .. p-w                 left the window, not yet folded: at most w tokens, through fq.fk
    0 .. F(p)-1                 folded: s = sum fk v^T, z = sum fk

When p % w == 0 the w tokens p-2w .. p-w-1 are folded before the new one enters, so F(p) = max(0, w (p // w - 1)): the
state is written once in w steps, and its traffic per token is 1 + 1/w of its bytes where updating at each would cost 2.
The tokens of rank below m (`sink_k` [N,m,G,d]) are written to the sinks and are hidden from window and far field.

q [B,1,H,d], k [B,1,G,d], v [B,1,G,dv]; fq [B,1,H,F] and fk [B,1,G,F] are the features of this token's query and key;
None for both is window attention, with ring_f, s, z None. Pools, row b at `index`[b] (None: b): ring_k [N,2w,G,d],
ring_v [N,2w,G,dv], ring_f [N,2w,G,F], s [N,G,F,dv], z [N,G,F], states in float32 or float64. mix [H], sink_logits
[H,n]. A row starts at pos 0 with s and z zeroed by the caller; what rings and sinks held before is not read. o
[B,1,H,dv] has q's dtype. No gradients.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linearize.ops._library import accumulation_dtype, define_operator, require
from linearize.ops.hybrid import fold_heads, soften
from linearize.ops.steps import check_one_token, check_pool, held, put

SCHEMA = (
    "hybrid_step(Tensor q, Tensor k, Tensor v, Tensor? fq, Tensor? fk, Tensor pos, Tensor(a!) ring_k, "
    "Tensor(b!) ring_v, Tensor(c!)? ring_f=None, Tensor(d!)? s=None, Tensor(e!)? z=None, Tensor? mix=None, "
    "Tensor(f!)? sink_k=None, Tensor(g!)? sink_v=None, Tensor? sink_logits=None, Tensor? index=None, *, "
    "int window, float scale) -> Tensor"
)


def hybrid_step_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor | None,
    fk: Tensor | None,
    pos: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_f: Tensor | None = None,
    s: Tensor | None = None,
    z: Tensor | None = None,
    mix: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_logits: Tensor | None = None,
    index: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> Tensor:
    """The truth: one row and one key at a time."""
    sinks, outputs = 0 if sink_k is None else sink_k.shape[1], []
    dtype, group = accumulation_dtype(q.dtype), q.shape[2] // k.shape[2]
    for b in range(q.shape[0]):
        n, p, size = b if index is None else int(index[b]), int(pos[b]), 2 * window
        if s is not None and z is not None and ring_f is not None and p % window == 0 and p >= size:
            for rank in range(max(p - size, sinks), p - window):
                feature, value = ring_f[n, rank % size].to(dtype), ring_v[n, rank % size].to(dtype)
                s[n] += feature[:, :, None] * value[:, None, :]
                z[n] += feature
        _write(n, p % size, b, ((ring_k, k), (ring_v, v), (ring_f, fk)))
        if p < sinks:
            _write(n, p, b, ((sink_k, k), (sink_v, v)))
        near = [(ring_k[n, rank % size], ring_v[n, rank % size]) for rank in range(max(sinks, p - window + 1), p + 1)]
        if sink_k is not None and sink_v is not None:
            near += [(sink_k[n, rank], sink_v[n, rank]) for rank in range(min(sinks, p + 1))]
        pending = range(max(sinks, window * (p // window - 1), 0), p - window + 1)
        rows = []
        for h in range(q.shape[2]):
            g, c = h // group, 1.0 if mix is None else float(mix[h])
            scores = [scale * float(q[b, 0, h].to(dtype) @ key[g].to(dtype)) for key, _ in near]
            logits = [] if sink_logits is None else sink_logits[h].tolist()
            top = max([*scores, *logits], default=0.0)
            below = c * sum(math.exp(x - top) for x in [*scores, *logits])
            above = torch.zeros(v.shape[3], dtype=dtype)
            for score, (_, value) in zip(scores, near, strict=True):
                above = above + c * math.exp(score - top) * value[g].to(dtype)
            if fq is not None and ring_f is not None and s is not None and z is not None:
                reader = fq[b, 0, h].to(dtype)
                above, below = above + reader @ s[n, g], below + float(reader @ z[n, g])
                for rank in pending:
                    weight = float(reader @ ring_f[n, rank % size, g].to(dtype))
                    above, below = above + weight * ring_v[n, rank % size, g].to(dtype), below + weight
            rows.append(above / below if below else above)
        outputs.append(torch.stack(rows).to(q.dtype)[None])
    return torch.stack(outputs)


def _write(row: int, place: int, b: int, pairs: tuple[tuple[Tensor | None, Tensor | None], ...]) -> None:
    for pool, new in pairs:
        if pool is not None and new is not None:
            pool[row, place] = new[b, 0].to(pool.dtype)


def hybrid_step_decomposed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor | None,
    fk: Tensor | None,
    pos: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_f: Tensor | None = None,
    s: Tensor | None = None,
    z: Tensor | None = None,
    mix: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_logits: Tensor | None = None,
    index: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> Tensor:
    """Standard operators over all 2w columns of the rings, masked by their ranks."""
    check_hybrid_step(q, k, v, fq, fk, pos, ring_k, ring_v, ring_f, s, z, sink_k, sink_v, index, window)
    kv_heads, dtype, size = k.shape[2], accumulation_dtype(q.dtype), 2 * window
    sinks = 0 if sink_k is None else sink_k.shape[1]
    column, p = torch.arange(size, device=q.device), pos[:, None]
    rank = p - torch.remainder(p - column, size)
    counts = rank >= sinks
    here = (column == torch.remainder(p, size))[..., None, None]
    keys = torch.where(here, k.to(ring_k.dtype), held(ring_k, index))
    old = held(ring_v, index)
    values = torch.where(here, v.to(ring_v.dtype), old)
    near_k, near_v, seen = keys, values, counts & (rank > p - window)
    if sink_k is not None and sink_v is not None:
        order = torch.arange(sinks, device=q.device)
        mine = (order == p)[..., None, None]
        kept = [torch.where(mine, x.to(pool.dtype), held(pool, index)) for pool, x in ((sink_k, k), (sink_v, v))]
        near_k, near_v = torch.cat([kept[0], keys], 1), torch.cat([kept[1], values], 1)
        seen = torch.cat([order <= p, seen], 1)
        put(sink_k, index, kept[0])
        put(sink_v, index, kept[1])
    scores = fold_heads(q.to(dtype) * scale, kv_heads) @ near_k.to(dtype).permute(0, 2, 3, 1)
    scores = scores.unsqueeze(3).masked_fill(~seen[:, None, None, None], float("-inf"))
    weights, below = soften(scores, sink_logits, mix)
    above = weights.squeeze(3) @ near_v.to(dtype).transpose(1, 2)
    below = below.squeeze(3)
    if fq is not None and fk is not None and ring_f is not None and s is not None and z is not None:
        before = held(ring_f, index)
        leaving = counts_of_fold(p, column, window, sinks).to(dtype)[..., None, None] * before.to(dtype)
        states = held(s, index) + leaving.permute(0, 2, 3, 1) @ old.to(dtype).transpose(1, 2)
        masses = held(z, index) + leaving.sum(dim=1)
        features = torch.where(here, fk.to(ring_f.dtype), before)
        folded = window * (torch.div(p, window, rounding_mode="floor") - 1)
        pending = (counts & (rank >= folded) & (rank <= p - window)).to(dtype)
        reader = fold_heads(fq.to(dtype), kv_heads)
        far = (reader @ features.to(dtype).permute(0, 2, 3, 1)) * pending[:, None, None]
        above = above + far @ values.to(dtype).transpose(1, 2) + reader @ states
        below = below + far.sum(dim=-1, keepdim=True) + reader @ masses.unsqueeze(-1)
        put(ring_f, index, features)
        put(s, index, states)
        put(z, index, masses)
    put(ring_k, index, keys)
    put(ring_v, index, values)
    return (above / below.masked_fill(below == 0, 1.0)).flatten(1, 2).unsqueeze(1).to(q.dtype)


def counts_of_fold(p: Tensor, column: Tensor, window: int, sinks: int) -> Tensor:
    """Bool [B,2w]: the columns whose tokens, ranks p-2w .. p-w-1, are folded before the token of rank p enters."""
    size = 2 * window
    rank = p - 1 - torch.remainder(p - 1 - column, size)
    now = (torch.remainder(p, window) == 0) & (p >= size)
    return now & (rank < p - window) & (rank >= sinks)


def check_hybrid_step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor | None,
    fk: Tensor | None,
    pos: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_f: Tensor | None,
    s: Tensor | None,
    z: Tensor | None,
    sink_k: Tensor | None,
    sink_v: Tensor | None,
    index: Tensor | None,
    window: int,
) -> None:
    """Raise `OperatorError` unless heads, rings and states fit together."""
    name, heads, kv_heads = "hybrid_step", q.shape[2], k.shape[2]
    check_one_token(name, q)
    require(window >= 1, name, f"window is {window}, needs at least 1")
    require(heads % kv_heads == 0, name, f"{heads} query heads are no multiple of {kv_heads} kv heads")
    require(ring_k.shape[1] == 2 * window, name, f"the ring holds {ring_k.shape[1]} tokens, not 2 x {window}")
    require(ring_k.shape[:3] == ring_v.shape[:3], name, "ring_k and ring_v differ in [N,2w,G]")
    require(pos.dtype == torch.int64 and pos.ndim == 1, name, "pos must be int64 of [B]")
    given = sum(x is not None for x in (fq, fk, ring_f, s, z))
    require(given in (0, 5), name, "give all of fq, fk, ring_f, s and z, or none")
    require((sink_k is None) == (sink_v is None), name, "give both sink_k and sink_v, or neither")
    for state in (s, z):
        if state is not None:
            check_pool(name, q.shape[0], state, index, q.dtype)


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fq: Tensor | None,
    fk: Tensor | None,
    pos: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    ring_f: Tensor | None = None,
    s: Tensor | None = None,
    z: Tensor | None = None,
    mix: Tensor | None = None,
    sink_k: Tensor | None = None,
    sink_v: Tensor | None = None,
    sink_logits: Tensor | None = None,
    index: Tensor | None = None,
    *,
    window: int,
    scale: float,
) -> Tensor:
    check_hybrid_step(q, k, v, fq, fk, pos, ring_k, ring_v, ring_f, s, z, sink_k, sink_v, index, window)
    return q.new_empty(*q.shape[:3], v.shape[3])


HYBRID_STEP = define_operator(
    SCHEMA,
    fake=_fake,
    reference=hybrid_step_decomposed,
    recurrence=hybrid_step_recurrence,
    streamed=hybrid_step_decomposed,
)
hybrid_step = HYBRID_STEP.overload
