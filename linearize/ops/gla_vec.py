"""`linearize::gla_vec_chunk`, gated linear attention with a gate per channel of the key, head and token.

    S_t = diag(e^{g_t}) S_{t-1} + k_t v_t^T,     o_t = scale q_t^T S_t

GLA (Yang et al. 2024, eq. 4), without the output norm and gate. Shapes: q [B,T,H,K], k [B,T,G,K], v [B,T,G,V],
query head h reads kv head h // (H / G); log gates g [B,T,Hs,K] <= 0 with Hs = G (state shared by the query heads of a
kv head) or H; state s0 [B,Hs,K,V]. States and gates are float32, or float64 for float64 inputs; o [B,T,H,V] has q's
dtype. Letters below: R = H / G, n = Hs / G (1 or R), r = R / n.

Within a piece token i reads token j through q_i . (e^{g_{j+1} + .. + g_i} k_j). The exponent is summed as such: split
into e^{sum to i} and e^{-sum to j}, as papers write it, the second overflows at a total gate of -88 (float32).
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._library import accumulation_dtype, define_operator, require

SCHEMA = (
    "gla_vec_chunk(Tensor q, Tensor k, Tensor v, Tensor g, Tensor? s0=None, *, "
    "float scale=1.0, int chunk=64) -> (Tensor o, Tensor s)"
)
PIECE = 16  # the decomposed form holds T x T x K numbers a head


def gla_vec_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The truth: one token at a time, the state held per query head and read back per state head."""
    batch, length, heads, key_dim = q.shape
    shared = heads // g.shape[2]
    out_dtype, dtype = q.dtype, accumulation_dtype(q.dtype)
    q, k, v, g = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k, v, g))
    s = torch.zeros(batch, heads, key_dim, v.shape[3], dtype=dtype, device=q.device)
    if s0 is not None:
        s = s0.to(dtype).repeat_interleave(shared, dim=1)
    outputs = []
    for t in range(length):
        s = torch.exp(g[:, t])[..., None] * s + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], s))
    return torch.stack(outputs, dim=1).to(out_dtype), s[:, ::shared].contiguous()


def gla_vec_decomposed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Standard operators, no loop, T dynamic; quadratic in T, so long inputs are fed in pieces."""
    batch, length, heads, key_dim = q.shape
    kv_heads, value_dim, states = k.shape[2], v.shape[3], g.shape[2] // k.shape[2]
    shared, dtype = heads // g.shape[2], accumulation_dtype(q.dtype)
    q_BGnTrK = (q.to(dtype) * scale).reshape(batch, length, kv_heads, states, shared, key_dim).permute(0, 2, 3, 1, 4, 5)
    g_BGnTK = g.to(dtype).reshape(batch, length, kv_heads, states, key_dim).permute(0, 2, 3, 1, 4)
    k_BG1KT = k.to(dtype).permute(0, 2, 3, 1)[:, :, None]
    v_BGTV = v.to(dtype).permute(0, 2, 1, 3)
    spans_BGnTKT, elapsed = channel_step_sums(g_BGnTK), g_BGnTK.cumsum(dim=3)
    seen_BGnTKT = k_BG1KT[:, :, :, None] * torch.exp(spans_BGnTKT)
    weights = (q_BGnTrK @ seen_BGnTKT).reshape(batch, kv_heads, states * length * shared, length)
    o = (weights @ v_BGTV).reshape(batch, kv_heads, states, length * shared, value_dim)
    s = (k_BG1KT * torch.exp(spans_BGnTKT[:, :, :, -1])) @ v_BGTV[:, :, None]
    if s0 is not None:
        s0_BGnKV = s0.to(dtype).reshape(batch, kv_heads, states, key_dim, value_dim)
        entering = q_BGnTrK * torch.exp(elapsed)[:, :, :, :, None]
        o = o + entering.reshape(batch, kv_heads, states, length * shared, key_dim) @ s0_BGnKV
        s = s + s0_BGnKV * torch.exp(elapsed[:, :, :, -1])[..., None]
    o = o.reshape(batch, kv_heads, states, length, shared, value_dim).permute(0, 3, 1, 2, 4, 5)
    s = s.reshape(batch, kv_heads * states, key_dim, value_dim)
    return o.reshape(batch, length, heads, value_dim).to(q.dtype).contiguous(), s.contiguous()


def gla_vec_streamed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The decomposed form on at most `PIECE` tokens at a time, the state carried: memory linear in T."""
    outputs, state, piece = [], s0, min(chunk, PIECE)
    for start in range(0, q.shape[1], piece):
        part = slice(start, start + piece)
        o, state = gla_vec_decomposed(q[:, part], k[:, part], v[:, part], g[:, part], state, scale=scale)
        outputs.append(o)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def channel_step_sums(g: Tensor) -> Tensor:
    """g [..,T,K] -> [..,T,K,T]: entry (i, c, j) is the sum of g_c over the steps j+1..i, -inf where i < j."""
    t = torch.arange(g.shape[-2], device=g.device)
    after, before = (t[:, None, None] > t), (t[:, None, None] < t)
    return torch.where(after, g[..., None], 0.0).cumsum(dim=-3).masked_fill(before, float("-inf"))


def check_gla_vec(q: Tensor, k: Tensor, v: Tensor, g: Tensor, s0: Tensor | None, name: str = "gla_vec_chunk") -> None:
    """Raise `OperatorError` unless heads, lengths, channels and the state fit together."""
    heads, kv_heads, states = q.shape[2], k.shape[2], g.shape[2]
    require(heads % kv_heads == 0, name, f"{heads} query heads are no multiple of {kv_heads} kv heads")
    require(states in (kv_heads, heads), name, f"gates for {states} heads: give {kv_heads} or {heads}")
    require(g.shape[3] == k.shape[3] == q.shape[3], name, "q, k and g differ in channels")
    require(k.shape[1] == q.shape[1] == v.shape[1] == g.shape[1], name, "q, k, v and g differ in length")
    require(s0 is None or s0.shape[1] == states, name, f"s0 must hold {states} heads")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    check_gla_vec(q, k, v, g, s0)
    batch, length, heads, key_dim = q.shape
    state = (batch, g.shape[2], key_dim, v.shape[3])
    return q.new_empty(batch, length, heads, v.shape[3]), q.new_empty(state, dtype=accumulation_dtype(q.dtype))


GLA_VEC_CHUNK = define_operator(
    SCHEMA,
    fake=_fake,
    reference=gla_vec_decomposed,
    recurrence=gla_vec_recurrence,
    streamed=gla_vec_streamed,
)
gla_vec_chunk = GLA_VEC_CHUNK.overload
