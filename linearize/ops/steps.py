"""`linearize::gla_step`, `gla_vec_step`, `delta_step`: one token a row, the states of many sequences updated in place.

    gla_step      S <- e^{g} S + k v^T,                          o = scale q^T S          g a number by head
    gla_vec_step  S <- diag(e^{g}) S + k v^T,                    o = scale q^T S          g a number by channel
    delta_step    S <- e^{g} S,  S <- S + k (b (v - S^T k))^T,   o = scale q^T S

What `gla_chunk`, `gla_vec_chunk` and `delta_chunk` compute for T = 1, without a new state: serving keeps the states of
all sequences in one pool s [N,Hs,K,V], and row b of the batch reads and writes the state `index`[b] (None: state b,
and N = B). No two rows may name the same state. q [B,1,H,K], k [B,1,G,K], v [B,1,G,V], g [B,1,Hs] or [B,1,Hs,K], beta
[B,1,Hs]; s in float32, or float64 for float64 inputs; o [B,1,H,V] in q's dtype. No gradients: torch has none for
operators that write to an argument.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._library import accumulation_dtype, define_operator, require
from linearize.ops.delta import check_delta, delta_recurrence, normalised
from linearize.ops.gla import check_gla, gla_chunk_recurrence
from linearize.ops.gla_vec import check_gla_vec, gla_vec_recurrence

GLA_SCHEMA = (
    "gla_step(Tensor q, Tensor k, Tensor v, Tensor? g, Tensor(a!) s, Tensor? index=None, *, float scale=1.0) -> Tensor"
)
GLA_VEC_SCHEMA = (
    "gla_vec_step(Tensor q, Tensor k, Tensor v, Tensor g, Tensor(a!) s, Tensor? index=None, *, float scale=1.0)"
    " -> Tensor"
)
DELTA_SCHEMA = (
    "delta_step(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g, Tensor(a!) s, Tensor? index=None, *, "
    "float scale=1.0, bool l2norm=False) -> Tensor"
)


def held(pool: Tensor, index: Tensor | None) -> Tensor:
    """The states [B,..] of a pool [N,..] that the rows of a batch have."""
    return pool if index is None else pool.index_select(0, index)


def put(pool: Tensor, index: Tensor | None, new: Tensor) -> None:
    """Write them back."""
    if index is None:
        pool.copy_(new)
    else:
        pool.index_copy_(0, index, new)


def check_pool(name: str, batch: int, pool: Tensor, index: Tensor | None, dtype: torch.dtype) -> None:
    """Raise `OperatorError` unless there is a state for every row, in the dtype that is updated in place."""
    rows = pool.shape[0] if index is None else index.shape[0]
    require(rows == batch, name, f"states for {rows} rows, a batch of {batch}")
    require(index is None or index.dtype == torch.int64, name, "index must be int64 of [B]")
    require(pool.dtype == accumulation_dtype(dtype), name, f"states must be {accumulation_dtype(dtype)}")


def check_one_token(name: str, q: Tensor) -> None:
    require(q.shape[1] == 1, name, f"one token a row, not {q.shape[1]}")


# ---- gla_step, gla_vec_step ------------------------------------------------------------------------------------------


def gla_step_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, index: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """The truth: the token loop's one token."""
    o, new = gla_chunk_recurrence(q, k, v, g, held(s, index), scale=scale)
    put(s, index, new)
    return o


def gla_step_decomposed(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, index: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """Standard operators."""
    check_gla_step(q, k, v, g, s, index)
    return _step(q, k, v, None if g is None else g.unsqueeze(-1), s, index, scale)


def gla_vec_step_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, index: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """The truth: the token loop's one token."""
    o, new = gla_vec_recurrence(q, k, v, g, held(s, index), scale=scale)
    put(s, index, new)
    return o


def gla_vec_step_decomposed(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, index: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    """Standard operators."""
    check_gla_vec_step(q, k, v, g, s, index)
    return _step(q, k, v, g, s, index, scale)


def _step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, index: Tensor | None, scale: float) -> Tensor:
    """g [B,1,Hs,K] or [B,1,Hs,1]; writes to s."""
    per_state = s.shape[1] // k.shape[2]
    new = held(s, index)
    new = new if g is None else new * torch.exp(g[:, 0].to(s.dtype)).unsqueeze(-1)
    written = k[:, 0].to(s.dtype).unsqueeze(-1) * v[:, 0].to(s.dtype).unsqueeze(-2)
    new = new + written.repeat_interleave(per_state, dim=1)
    o = _read(q, new, scale)
    put(s, index, new)
    return o


def _read(q: Tensor, s: Tensor, scale: float) -> Tensor:
    """q [B,1,H,K] of s [B,Hs,K,V]: [B,1,H,V]."""
    rows = q[:, 0].to(s.dtype).unflatten(1, (s.shape[1], q.shape[2] // s.shape[1]))
    return ((rows @ s) * scale).flatten(1, 2).unsqueeze(1).to(q.dtype)


def check_gla_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, index: Tensor | None) -> None:
    check_one_token("gla_step", q)
    check_gla(q, k, v, g, s, "gla_step")
    check_pool("gla_step", q.shape[0], s, index, q.dtype)


def check_gla_vec_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, index: Tensor | None) -> None:
    check_one_token("gla_vec_step", q)
    check_gla_vec(q, k, v, g, s, "gla_vec_step")
    check_pool("gla_vec_step", q.shape[0], s, index, q.dtype)


# ---- delta_step ------------------------------------------------------------------------------------------------------


def delta_step_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s: Tensor,
    index: Tensor | None = None,
    *,
    scale: float = 1.0,
    l2norm: bool = False,
) -> Tensor:
    """The truth: the token loop's one token."""
    o, new = delta_recurrence(q, k, v, beta, g, held(s, index), scale=scale, l2norm=l2norm)
    put(s, index, new)
    return o


def delta_step_decomposed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s: Tensor,
    index: Tensor | None = None,
    *,
    scale: float = 1.0,
    l2norm: bool = False,
) -> Tensor:
    """Standard operators."""
    check_delta_step(q, k, v, beta, g, s, index)
    dtype, per_state = s.dtype, s.shape[1] // k.shape[2]
    new = held(s, index)
    new = new if g is None else new * torch.exp(g[:, 0].to(dtype))[..., None, None]
    key = normalised(k[:, 0].to(dtype), l2norm).repeat_interleave(per_state, dim=1).unsqueeze(-2)
    value = v[:, 0].to(dtype).repeat_interleave(per_state, dim=1).unsqueeze(-2)
    u = beta[:, 0].to(dtype)[..., None, None] * (value - key @ new)
    new = new + key.transpose(-1, -2) * u
    o = _read(normalised(q.to(dtype), l2norm), new, scale).to(q.dtype)
    put(s, index, new)
    return o


def check_delta_step(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None, s: Tensor, index: Tensor | None
) -> None:
    check_one_token("delta_step", q)
    check_delta(q, k, v, beta, g, s, "delta_step")
    check_pool("delta_step", q.shape[0], s, index, q.dtype)


# ---- registration ----------------------------------------------------------------------------------------------------


def _shape(q: Tensor, v: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


def _fake_gla(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s: Tensor, index: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    check_gla_step(q, k, v, g, s, index)
    return _shape(q, v)


def _fake_gla_vec(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, s: Tensor, index: Tensor | None = None, *, scale: float = 1.0
) -> Tensor:
    check_gla_vec_step(q, k, v, g, s, index)
    return _shape(q, v)


def _fake_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s: Tensor,
    index: Tensor | None = None,
    *,
    scale: float = 1.0,
    l2norm: bool = False,
) -> Tensor:
    check_delta_step(q, k, v, beta, g, s, index)
    return _shape(q, v)


GLA_STEP = define_operator(
    GLA_SCHEMA,
    fake=_fake_gla,
    reference=gla_step_decomposed,
    recurrence=gla_step_recurrence,
    streamed=gla_step_decomposed,
)
GLA_VEC_STEP = define_operator(
    GLA_VEC_SCHEMA,
    fake=_fake_gla_vec,
    reference=gla_vec_step_decomposed,
    recurrence=gla_vec_step_recurrence,
    streamed=gla_vec_step_decomposed,
)
DELTA_STEP = define_operator(
    DELTA_SCHEMA,
    fake=_fake_delta,
    reference=delta_step_decomposed,
    recurrence=delta_step_recurrence,
    streamed=delta_step_decomposed,
)
gla_step, gla_vec_step, delta_step = GLA_STEP.overload, GLA_VEC_STEP.overload, DELTA_STEP.overload
