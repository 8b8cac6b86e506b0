"""`delta_chunk` on CPU: one chunk at a time for all heads, the state carried; u by triangular solves, no inverse.

Letters as in `linearize.ops.delta`; N = B G kv heads in all, C the chunk. Within a chunk
    (I + L) u = b (v - e^{elapsed} k S),   o = e^{elapsed} q S + (q k^T * D) u
    S <- e^{total} S + (e^{remaining} k)^T u
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.kernels.cpu._numbers import smallest_exponent
from linearize.kernels.registry import Kernel, register
from linearize.ops._library import accumulation_dtype
from linearize.ops.delta import check_delta, normalised


def stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 32,
    l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """See `linearize.ops.delta`; no tensor of size T x T exists."""
    check_delta(q, k, v, beta, g, s0)
    batch, length, heads, key_dim = q.shape
    kv_heads, value_dim, states = k.shape[2], v.shape[3], beta.shape[2] // k.shape[2]
    group, dtype, chunk = heads // kv_heads, accumulation_dtype(q.dtype), min(chunk, length)
    q_BGRTK = q.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)
    k_BGTK, v_BGTV = k.transpose(1, 2), v.transpose(1, 2)
    beta_BHsT = beta.to(dtype).transpose(1, 2)
    g_BHsT = None if g is None else g.to(dtype).transpose(1, 2)
    o = q.new_empty(batch, length, heads, value_dim)
    o_BGRTV = o.unflatten(2, (kv_heads, group)).permute(0, 2, 3, 1, 4)
    empty = (batch, kv_heads * states, key_dim, value_dim)
    s = q.new_zeros(empty, dtype=dtype) if s0 is None else s0.to(dtype, copy=True)
    s_MKV = s.flatten(0, 1)
    after = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).tril_(-1)
    for start in range(0, length, chunk):
        size = min(chunk, length - start)
        q_c = normalised(q_BGRTK.narrow(3, start, size).to(dtype), l2norm).reshape(-1, group * size, key_dim)
        k_c = normalised(k_BGTK.narrow(2, start, size).to(dtype), l2norm).reshape(-1, size, key_dim)
        v_c = v_BGTV.narrow(2, start, size).to(dtype).reshape(-1, 1, size, value_dim)
        beta_c, g_c = (
            None if x is None else x.narrow(2, start, size).reshape(-1, states, size) for x in (beta_BHsT, g_BHsT)
        )
        o_c = _chunk(q_c, k_c, v_c, beta_c, g_c, s_MKV, after[:size, :size])
        o_BGRTV.narrow(3, start, size).copy_(o_c.mul_(scale).view(batch, kv_heads, group, size, value_dim))
    return o, s


def _chunk(q: Tensor, k: Tensor, v: Tensor, beta: Tensor | None, g: Tensor | None, s: Tensor, after: Tensor) -> Tensor:
    """q [N,R*C,K], k [N,C,K], v [N,1,C,V], beta and g [N,n,C]; s [N*n,K,V] updated in place; o [N*n,r*C,V].

    `after` [C,C] is True below the diagonal.
    """
    assert beta is not None
    heads, states, size = beta.shape
    scores, likeness = torch.bmm(q, k.mT).view(heads, states, -1, size, size), torch.bmm(k, k.mT)[:, None]
    entering, writers, readers = q.view(heads, states, -1, q.shape[2]), k[:, None], k[:, None]
    if g is None:
        scores = scores.tril()
        kept = None
    else:
        spans = torch.where(after, g[..., None], 0.0).cumsum(dim=-2)
        elapsed, remaining = g.cumsum(dim=-1).exp(), spans[..., -1, :].exp()
        decay = spans.clamp_(min=smallest_exponent(g.dtype)).exp_()
        scores, likeness = scores.mul_(decay[:, :, None]).tril_(), likeness * decay
        by_row = elapsed.unsqueeze(2).expand(-1, -1, scores.shape[2], -1).reshape(heads, states, -1, 1)
        entering, readers = entering * by_row, readers * elapsed[..., None]
        writers, kept = writers * remaining[..., None], elapsed[..., -1].reshape(-1, 1, 1)
    per_state = (heads * states, -1)
    entering, readers, writers = (
        x.expand(heads, states, *x.shape[2:]).reshape(*per_state, x.shape[3]) for x in (entering, readers, writers)
    )
    values = v.expand(heads, states, *v.shape[2:]).reshape(*per_state, v.shape[3])
    weight = beta.reshape(*per_state, 1)
    system = likeness.expand(heads, states, size, size).reshape(-1, size, size) * weight
    u = torch.baddbmm(values, readers, s, alpha=-1).mul_(weight)
    u = torch.linalg.solve_triangular(system, u, upper=False, unitriangular=True)
    o = torch.baddbmm(torch.bmm(entering, s), scores.reshape(heads * states, -1, size), u)
    if kept is not None:
        s.mul_(kept)
    s.baddbmm_(writers.mT, u)
    return o


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None = None,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 32,
    l2norm: bool = False,
) -> tuple[Tensor, Tensor]:
    """One token: S <- e^g S, then S <- S + k (b (v - S^T k))^T, o = scale q S."""
    check_delta(q, k, v, beta, g, s0)
    batch, _, heads, key_dim = q.shape
    kv_heads, value_dim, states = k.shape[2], v.shape[3], beta.shape[2]
    dtype, group = accumulation_dtype(q.dtype), states // kv_heads
    key = normalised(k.to(dtype), l2norm).reshape(batch, kv_heads, 1, 1, key_dim)
    key = key.expand(batch, kv_heads, group, 1, key_dim).reshape(-1, 1, key_dim)
    value = v.to(dtype).reshape(batch, kv_heads, 1, 1, value_dim)
    value = value.expand(batch, kv_heads, group, 1, value_dim).reshape(-1, 1, value_dim)
    weight = beta.to(dtype).reshape(-1, 1, 1)
    if s0 is None:
        s = torch.bmm(key.mT, weight * value)
    else:
        s = s0.to(dtype).reshape(-1, key_dim, value_dim)
        s = s if g is None else s * g.to(dtype).exp().reshape(-1, 1, 1)
        s = torch.baddbmm(s, key.mT, weight * torch.baddbmm(value, key, s, alpha=-1))
    o = torch.bmm(normalised(q.to(dtype), l2norm).reshape(batch * states, heads // states, key_dim), s)
    return o.mul_(scale).to(q.dtype).view(batch, 1, heads, value_dim), s.view(batch, states, key_dim, value_dim)


def _check_step(q: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if q.shape[1] == 1 else f"T is {q.shape[1]}, not 1"


def _check_stream(q: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if q.shape[1] > 0 else "T is 0"


DELTA_STEP = register(Kernel("cpu.delta_step", "delta_chunk", "cpu", 20, _check_step, step))
DELTA_STREAM = register(Kernel("cpu.delta_stream", "delta_chunk", "cpu", 10, _check_stream, stream))
