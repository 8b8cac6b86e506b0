"""`hybrid_chunk` on CPU: one chunk of queries at a time for all heads, states carried, no tensor of size T x T.

Letters as in `linearize.ops.hybrid`; N = B G, R query heads a kv head, C the chunk, J = m + C + w columns: the sink
tokens, then the part of the delay line that a chunk touches. Its first C columns are the leaving tokens: above the
diagonal they are still in the window, on it and below they are far. So one weight matrix holds both kinds and meets
the values once:

    weights = c e^{s - m} on the band, fq.fk on the lower triangle;   o = (weights v + fq S) / (sum weights + fq z)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.cpu._numbers import smallest_exponent
from linearize.kernels.registry import Kernel, always, register
from linearize.ops._library import accumulation_dtype
from linearize.ops.hybrid import States, check_hybrid, fold_heads, initial_states, window_keys

CHUNK = 64


@dataclass(frozen=True)
class _Far:
    """The linear part: fq [B,T,H,F], fk [B,T,G,F], where leaving tokens exist (None = all), states updated in place."""

    fq: Tensor
    fk: Tensor
    exists: Tensor | None
    s_NFV: Tensor
    z_N1F: Tensor

    def chunk(self, start: int, size: int) -> tuple[Tensor, Tensor]:
        """Features of the chunk's queries as rows [N,R*C,F] and of its leaving tokens as columns [N,C,F]."""
        kv_heads, dtype = self.fk.shape[2], self.s_NFV.dtype
        writer = self.fk.narrow(1, start, size).to(dtype)
        if self.exists is not None:
            writer = writer * self.exists.narrow(1, start, size)[..., None, None]
        reader = fold_heads(self.fq.narrow(1, start, size).to(dtype), kv_heads).flatten(0, 1)
        return reader, _columns(writer, dtype).contiguous()

    def read(self, reader: Tensor, above: Tensor, below: Tensor) -> None:
        """Add what the queries read from the states to above [N,R*C,V] and below [N,R*C,1]."""
        above.baddbmm_(reader, self.s_NFV)
        below.add_((reader * self.z_N1F).sum(dim=-1, keepdim=True))  # faster than a matrix-vector product

    def write(self, writer: Tensor, values: Tensor) -> None:
        """Add the leaving tokens to the states."""
        self.s_NFV.baddbmm_(writer.mT, values)
        self.z_N1F.add_(writer.sum(dim=1, keepdim=True))


@dataclass(frozen=True)
class _Near:
    """The softmax part: the delay line, the sinks, and additive masks of 0 and -inf."""

    q: Tensor
    k: Tensor
    v: Tensor
    band: Tensor
    hidden: Tensor | None
    sinks: tuple[Tensor, Tensor, Tensor] | None
    logits: Tensor | None
    mix: Tensor | None
    scale: float

    def chunk(self, start: int, size: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """weights [B,G,R,C,J], values [N,J,V], and the sink logits' weights summed [B,G,R,C,1]."""
        batch, kv_heads, dtype = self.k.shape[0], self.k.shape[2], self.band.dtype
        columns = size + self.band.shape[1] - self.band.shape[0]
        keys, values = (_columns(x.narrow(1, start, columns), dtype) for x in (self.k, self.v))
        bias = self.band[:size, :columns]
        if self.hidden is not None:
            bias = bias + self.hidden.narrow(1, start, columns)[:, None]
        if self.sinks is not None:
            keys, values = torch.cat([self.sinks[0], keys], 1), torch.cat([self.sinks[1], values], 1)
            bias = torch.cat([self.sinks[2].narrow(1, start, size), bias.expand(batch, size, columns)], dim=2)
        rows = fold_heads(self.q.narrow(1, start, size).to(dtype), kv_heads).flatten(0, 1) * self.scale
        scores = torch.bmm(rows, keys.mT).view(batch, kv_heads, -1, size, keys.shape[1])
        bias = bias if bias.ndim == 2 else bias[:, None, None]
        return scores, values, _soften_(scores.add_(bias), self.logits, self.mix, allowed=bias.exp())


def _soften_(scores: Tensor, logits: Tensor | None, mix: Tensor | None, allowed: Tensor | None = None) -> Tensor | None:
    """scores [B,G,R,C,J], -inf where hidden, -> c e^{s - m} in place; returns the same of the logits, summed.

    `allowed`, 1 where seen and 0 where hidden, spares exp the exponents that underflow.
    """
    top = scores.amax(dim=-1, keepdim=True)
    if logits is not None:
        top = torch.maximum(top, logits.amax(dim=-1, keepdim=True))
    scores.sub_(top.clamp_(min=torch.finfo(top.dtype).min))  # a row without keys: -inf - finite
    if allowed is None:
        scores.exp_()
    else:
        scores.clamp_(min=smallest_exponent(top.dtype)).exp_().mul_(allowed)
    extra = None if logits is None else (logits - top).exp_().sum(dim=-1, keepdim=True)
    if mix is None:
        return extra
    scores.mul_(mix)
    return None if extra is None else extra.mul_(mix)


def stream(
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
    """See `linearize.ops.hybrid`."""
    check_hybrid(q, k, v, mask, (fq, fk), (sink_k, sink_v, sink_mask), window)
    batch, length, heads, _ = q.shape
    kv_heads, value_dim, chunk = k.shape[2], v.shape[3], min(CHUNK, length)
    dtype = accumulation_dtype(q.dtype)
    all_exist = bool(mask.all())
    near = _Near(
        q,
        k,
        v,
        band=_minus_infinity(window_keys(chunk, window, q.device), dtype),
        hidden=None if all_exist else _minus_infinity(mask, dtype),
        sinks=_sinks(sink_k, sink_v, sink_mask, dtype),
        logits=_per_head(sink_logits, kv_heads, dtype),
        mix=_per_head(mix, kv_heads, dtype),
        scale=scale,
    )
    s, z = initial_states(q, v, kv_heads, fk, s0, z0)
    far = None
    if fq is not None and fk is not None:
        states = s.flatten(0, 1), z.flatten(0, 1)[:, None]
        far = _Far(fq, fk, None if all_exist else mask, *states)
    o = q.new_empty(batch, length, heads, value_dim)
    o_BGRTV = o.unflatten(2, (kv_heads, heads // kv_heads)).permute(0, 2, 3, 1, 4)
    for start in range(0, length, chunk):
        size = min(chunk, length - start)
        above, below = _chunk(near, far, start, size)
        above, below = (x.view(batch, kv_heads, -1, size, x.shape[2]) for x in (above, below))
        torch.div(above, below.masked_fill_(below == 0, 1.0), out=o_BGRTV.narrow(3, start, size))
    return o, s, z


def _chunk(near: _Near, far: _Far | None, start: int, size: int) -> tuple[Tensor, Tensor]:
    """Numerator [N,R*C,V] and denominator [N,R*C,1] of a chunk of queries; moves the states past it."""
    weights, values, extra = near.chunk(start, size)
    shape = weights.shape
    sinks = 0 if near.sinks is None else near.sinks[0].shape[1]
    left = slice(sinks, sinks + size)
    features = None if far is None else far.chunk(start, size)
    if features is not None:
        reader, writer = features
        weights[..., left].add_(torch.bmm(reader, writer.mT).view(*shape[:4], size).tril_())
    below = weights.sum(dim=-1, keepdim=True)
    below = below if extra is None else below.add_(extra)
    below = below.view(values.shape[0], -1, 1)
    above = torch.bmm(weights.view(values.shape[0], -1, shape[4]), values)
    if far is not None and features is not None:
        reader, writer = features
        far.read(reader, above, below)
        far.write(writer, values[:, left])
    return above, below


def step(
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
    """One token: index 0 of the delay line joins the state, the window is all the others."""
    check_hybrid(q, k, v, mask, (fq, fk), (sink_k, sink_v, sink_mask), window)
    batch, _, heads, _ = q.shape
    kv_heads, value_dim, dtype = k.shape[2], v.shape[3], accumulation_dtype(q.dtype)
    keys, values, seen = k[:, 1:], v[:, 1:], mask[:, 1:]
    if sink_k is not None and sink_v is not None and sink_mask is not None:
        keys, values = torch.cat([sink_k, keys], 1), torch.cat([sink_v, values], 1)
        seen = torch.cat([sink_mask[:, 0], seen], 1)
    rows = q.to(dtype).reshape(batch * kv_heads, heads // kv_heads, -1) * scale
    scores = torch.bmm(rows, _columns(keys, dtype).mT)
    by_head = scores.view(batch, kv_heads, -1, 1, seen.shape[1])
    by_head.masked_fill_(~seen[:, None, None, None], float("-inf"))
    extra = _soften_(by_head, _per_head(sink_logits, kv_heads, dtype), _per_head(mix, kv_heads, dtype))
    below = scores.sum(dim=-1, keepdim=True)
    below = below if extra is None else below.add_(extra.view_as(below))
    above = torch.bmm(scores, _columns(values, dtype))
    if fq is None or fk is None:
        s, z = initial_states(q, v, kv_heads, fk, s0, z0)
    else:
        writer = fk[:, 0].to(dtype) * mask[:, :1, None]
        added = writer[..., None] * v[:, 0, :, None].to(dtype)
        s, z = added if s0 is None else added.add_(s0), writer if z0 is None else writer.add_(z0)
        reader = fq.to(dtype).reshape(batch * kv_heads, heads // kv_heads, -1)
        above.baddbmm_(reader, s.view(batch * kv_heads, -1, value_dim))
        below.add_((reader * z.view(batch * kv_heads, 1, -1)).sum(dim=-1, keepdim=True))
    o = above.div_(below.masked_fill_(below == 0, 1.0))
    return o.view(batch, 1, heads, value_dim).to(q.dtype), s, z


def _check_step(q: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if q.shape[1] == 1 else f"T is {q.shape[1]}, not 1"


def _sinks(
    k: Tensor | None, v: Tensor | None, mask: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Sink tokens as columns k, v [N,m,d] and their additive mask [B,T,m]."""
    if k is None or v is None or mask is None:
        return None
    return _columns(k, dtype), _columns(v, dtype), _minus_infinity(mask, dtype)


def _columns(x: Tensor, dtype: torch.dtype) -> Tensor:
    """[B,J,G,d] -> [N,J,d]; a view where batch and heads allow it."""
    return x.to(dtype).transpose(1, 2).flatten(0, 1)


def _minus_infinity(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where allowed, -inf elsewhere."""
    return torch.zeros(allowed.shape, dtype=dtype, device=allowed.device).masked_fill_(~allowed, float("-inf"))


def _per_head(x: Tensor | None, kv_heads: int, dtype: torch.dtype) -> Tensor | None:
    """[H] or [H,n] -> [G,R,1,n], to stand against [B,G,R,C,..]."""
    return None if x is None else x.to(dtype).reshape(kv_heads, x.shape[0] // kv_heads, 1, -1)


HYBRID_STREAM = register(Kernel("cpu.hybrid_stream", "hybrid_chunk", "cpu", 10, always, stream))
HYBRID_STEP = register(Kernel("cpu.hybrid_step", "hybrid_chunk", "cpu", 20, _check_step, step))
