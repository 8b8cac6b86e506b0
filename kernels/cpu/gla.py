"""`gla_chunk` on CPU: one chunk at a time for all heads with the state carried, so the working set stays in cache.

Letters as in `linearize.ops.gla`; N = B G kv heads in all, the R query heads of one become rows of its matrices, C is
the chunk. Within a chunk o = (q k^T * decay) v + e^{elapsed} q S, then S <- e^{total} S + (e^{remaining} k)^T v.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.cpu._numbers import smallest_exponent
from linearize.kernels.registry import Kernel, register
from linearize.ops._library import accumulation_dtype
from linearize.ops.gla import check_gla, state_head_count


def stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """See `linearize.ops.gla`; no tensor of size T x T exists."""
    check_gla(q, k, v, g, s0)
    batch, length, heads, key_dim = q.shape
    kv_heads, value_dim, chunk = k.shape[2], v.shape[3], min(chunk, length)
    group, states = heads // kv_heads, state_head_count(k, g)
    dtype = accumulation_dtype(q.dtype)
    q_BGRTK = q.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)
    k_BGTK, v_BGTV = k.transpose(1, 2), v.transpose(1, 2)
    gates = None if g is None else g.to(dtype).transpose(1, 2).reshape(batch * kv_heads, states // kv_heads, length)
    o = q.new_empty(batch, length, heads, value_dim)
    o_BGRTV = o.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)
    s = q.new_zeros(batch, states, key_dim, value_dim, dtype=dtype) if s0 is None else s0.to(dtype, copy=True)
    s_NnKV = s.view(batch * kv_heads, states // kv_heads, key_dim, value_dim)
    after = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril_(-1)
    for start in range(0, length, chunk):
        size = min(chunk, length - start)
        q_c = q_BGRTK.narrow(3, start, size).to(dtype).reshape(batch * kv_heads, group * size, key_dim)
        k_c = k_BGTK.narrow(2, start, size).to(dtype).reshape(batch * kv_heads, size, key_dim)
        v_c = v_BGTV.narrow(2, start, size).to(dtype).reshape(batch * kv_heads, size, value_dim)
        if gates is None:
            o_c = _plain_chunk(q_c, k_c, v_c, s_NnKV, scale)
        else:
            g_c = gates.narrow(2, start, size)
            o_c = _gated_chunk(q_c, k_c, v_c, g_c, s_NnKV, scale, after[:size, :size])
        o_BGRTV.narrow(3, start, size).copy_(o_c.view(batch, kv_heads, group, size, value_dim))
    return o, s


def _plain_chunk(q: Tensor, k: Tensor, v: Tensor, s: Tensor, scale: float) -> Tensor:
    """q [N,R*C,K], k [N,C,K], v [N,C,V], s [N,1,K,V] updated in place; o [N,R*C,V]."""
    rows, size = q.shape[1], k.shape[1]
    scores = torch.bmm(q, k.mT).view(-1, rows // size, size, size).tril_().view(-1, rows, size)
    o = torch.bmm(scores, v)
    s = s.view(-1, k.shape[2], v.shape[2])
    o.baddbmm_(q, s)
    s.baddbmm_(k.mT, v)
    return o.mul_(scale)


def _gated_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, scale: float, after: Tensor) -> Tensor:
    """As `_plain_chunk` with log gates g [N,n,C] and s [N,n,K,V]; `after` [C,C] is True below the diagonal."""
    heads, rows, key_dim = q.shape
    size, states, value_dim = k.shape[1], g.shape[1], v.shape[2]
    spans = torch.where(after, g[..., None], 0.0).cumsum(dim=-2)
    elapsed, remaining = g.cumsum(dim=-1), spans[..., -1, :].exp()
    decay = spans.clamp_(min=smallest_exponent(g.dtype)).exp_()
    scores = torch.bmm(q, k.mT).view(heads, rows // size, size, size).mul_(decay).tril_()
    o = torch.bmm(scores.view(heads, rows, size), v)
    entering = q.view(heads, states, -1, size, key_dim) * elapsed.exp()[:, :, None, :, None]
    entering, per_state = entering.view(heads * states, -1, key_dim), s.view(heads * states, key_dim, value_dim)
    o.view(heads * states, -1, value_dim).baddbmm_(entering, per_state)
    leaving = (k.mT[:, None] * remaining[:, :, None, :]).reshape(heads, states * key_dim, size)
    s.mul_(elapsed[..., -1, None, None].exp())
    s.view(heads, states * key_dim, value_dim).baddbmm_(leaving, v)
    return o.mul_(scale)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """One token: S <- e^g S + k v^T, o = scale q S."""
    check_gla(q, k, v, g, s0)
    batch, _, heads, key_dim = q.shape
    kv_heads, value_dim, states = k.shape[2], v.shape[3], state_head_count(k, g)
    dtype = accumulation_dtype(q.dtype)
    s = k.to(dtype).reshape(batch, kv_heads, 1, key_dim, 1) * v.to(dtype).reshape(batch, kv_heads, 1, 1, value_dim)
    if s0 is not None:
        kept = s0.to(dtype) if g is None else s0.to(dtype) * g.to(dtype).exp().reshape(batch, states, 1, 1)
        s = kept.reshape(batch, kv_heads, -1, key_dim, value_dim) + s
    elif states > kv_heads:
        s = s.expand(batch, kv_heads, states // kv_heads, key_dim, value_dim).contiguous()
    s = s.view(batch * states, key_dim, value_dim)
    o = torch.bmm(q.to(dtype).reshape(batch * states, heads // states, key_dim), s)
    return o.mul_(scale).to(q.dtype).view(batch, 1, heads, value_dim), s.view(batch, states, key_dim, value_dim)


def _check_step(q: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if q.shape[1] == 1 else f"T is {q.shape[1]}, not 1"


def _check_stream(q: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if q.shape[1] > 0 else "T is 0"


GLA_STEP = register(Kernel("cpu.gla_step", "gla_chunk", "cpu", 20, _check_step, step))
GLA_STREAM = register(Kernel("cpu.gla_stream", "gla_chunk", "cpu", 10, _check_stream, stream))
