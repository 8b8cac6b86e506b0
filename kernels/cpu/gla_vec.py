"""`gla_vec_chunk` on CPU: one chunk at a time for all heads, the state carried, by halving.

Tokens i > j of a chunk are parted once when it is halved again and again: by the middle m between them. There
    e^{g_{j+1} + .. + g_i} = e^{g_{j+1} + .. + g_{m-1}} e^{g_m + .. + g_i},
a factor for the key and one for the query, both <= 1 whatever the gates are. So a chunk of C tokens takes log2 C levels
of plain matrix products and C log2 C exponentials a channel, and no tensor C x C x K exists.

Letters as in `linearize.ops.gla_vec`; N = B G, P the chunk's size filled up to a power of 2 with empty tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from linearize.kernels.cpu._numbers import smallest_exponent
from linearize.kernels.registry import Kernel, register
from linearize.ops._library import accumulation_dtype
from linearize.ops.gla_vec import check_gla_vec


def stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """See `linearize.ops.gla_vec`; no tensor of size T x T exists."""
    check_gla_vec(q, k, v, g, s0)
    batch, length, heads, key_dim = q.shape
    kv_heads, value_dim, states = k.shape[2], v.shape[3], g.shape[2] // k.shape[2]
    shared, dtype = heads // g.shape[2], accumulation_dtype(q.dtype)
    q_BGnTrK = q.unflatten(2, (kv_heads, states, shared)).permute(0, 2, 3, 1, 4, 5)
    g_BGnTK = g.unflatten(2, (kv_heads, states)).permute(0, 2, 3, 1, 4)
    k_BGTK, v_BGTV = k.transpose(1, 2), v.transpose(1, 2)
    o = q.new_empty(batch, length, heads, value_dim)
    o_BGnTrV = o.unflatten(2, (kv_heads, states, shared)).permute(0, 2, 3, 1, 4, 5)
    empty = (batch, kv_heads * states, key_dim, value_dim)
    s = q.new_zeros(empty, dtype=dtype) if s0 is None else s0.to(dtype, copy=True)
    s_NnKV = s.view(batch * kv_heads, states, key_dim, value_dim)
    for start in range(0, length, chunk):
        size = min(chunk, length - start)
        q_c, g_c = (x.narrow(3, start, size).to(dtype).flatten(0, 1) for x in (q_BGnTrK, g_BGnTK))
        k_c, v_c = (x.narrow(2, start, size).to(dtype).flatten(0, 1) for x in (k_BGTK, v_BGTV))
        o_c = _chunk(q_c, k_c, v_c, g_c, s_NnKV)
        o_BGnTrV.narrow(3, start, size).copy_(o_c.mul_(scale).unflatten(0, (batch, kv_heads)))
    return o, s


def _chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor) -> Tensor:
    """q [N,n,C,r,K], k [N,C,K], v [N,C,V], g [N,n,C,K]; s [N,n,K,V] updated in place; o [N,n,C,r,V]."""
    size, least = k.shape[1], smallest_exponent(g.dtype)
    elapsed = g.cumsum(dim=2)
    o = ((q * elapsed.exp()[:, :, :, None]).flatten(2, 3) @ s).view(*q.shape[:4], v.shape[2])
    o.add_((q * k[:, None, :, None]).sum(dim=-1, keepdim=True) * v[:, None, :, None])
    leaving = k[:, None] * _sums_after(g).clamp_(min=least).exp_()
    s.mul_(elapsed[:, :, -1, :, None].exp()).add_(leaving.mT @ v[:, None])
    full = 1 << (size - 1).bit_length()
    if full > size:
        empty = (0, 0, 0, full - size)
        q, k, v, g = pad(q, (0, 0, *empty)), pad(k, empty), pad(v, empty), pad(g, empty)
        _halves(q, k, v, g, filled := pad(o, (0, 0, *empty)), least)
        return filled[:, :, :size]
    _halves(q, k, v, g, o, least)
    return o


def _halves(q: Tensor, k: Tensor, v: Tensor, g: Tensor, o: Tensor, least: float) -> None:
    """Add to o what every token reads from the earlier tokens of its chunk, level by level."""
    half = k.shape[1] // 2
    while half:
        split = (-1, 2, half)
        from_middle = g.unflatten(2, split)[:, :, :, 1].cumsum(dim=-2).clamp_(min=least).exp_()
        to_middle = _sums_after(g.unflatten(2, split)[:, :, :, 0]).clamp_(min=least).exp_()
        keys = k.unflatten(1, split)[:, None, :, 0] * to_middle
        queries = q.unflatten(2, split)[:, :, :, 1] * from_middle[:, :, :, :, None]
        values = v.unflatten(1, split)[:, None, :, 0]
        read = (queries.flatten(3, 4) @ keys.mT) @ values
        late = o.unflatten(2, split)[:, :, :, 1]
        late.add_(read.view(late.shape))
        half //= 2


def _sums_after(g: Tensor) -> Tensor:
    """[..,C,K]: the sum of the gates behind each token, 0 at the last."""
    return pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(dim=-2).flip(-2)


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """One token: S <- diag(e^g) S + k v^T, o = scale q S."""
    check_gla_vec(q, k, v, g, s0)
    batch, _, heads, key_dim = q.shape
    kv_heads, value_dim, states = k.shape[2], v.shape[3], g.shape[2]
    dtype = accumulation_dtype(q.dtype)
    s = k.to(dtype).reshape(batch, kv_heads, 1, key_dim, 1) * v.to(dtype).reshape(batch, kv_heads, 1, 1, value_dim)
    s = s.expand(batch, kv_heads, states // kv_heads, key_dim, value_dim).reshape(batch * states, key_dim, value_dim)
    if s0 is not None:
        gate = g.to(dtype).exp().reshape(batch * states, key_dim, 1)
        s = torch.addcmul(s, gate, s0.to(dtype).reshape(s.shape))
    o = torch.bmm(q.to(dtype).reshape(batch * states, heads // states, key_dim), s)
    return o.mul_(scale).to(q.dtype).view(batch, 1, heads, value_dim), s.view(batch, states, key_dim, value_dim)


def _check_step(q: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if q.shape[1] == 1 else f"T is {q.shape[1]}, not 1"


def _check_stream(q: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if q.shape[1] > 0 else "T is 0"


GLA_VEC_STEP = register(Kernel("cpu.gla_vec_step", "gla_vec_chunk", "cpu", 20, _check_step, step))
GLA_VEC_STREAM = register(Kernel("cpu.gla_vec_stream", "gla_vec_chunk", "cpu", 10, _check_stream, stream))
