"""`linearize::gla_chunk`, gated linear attention with one scalar gate per head and token.

    S_t = e^{g_t} S_{t-1} + k_t v_t^T,     o_t = scale q_t^T S_t

Mamba-2's SSD form (Dao and Gu 2024, eq. 16) with k, v, q for B, x, C; g = None is plain linear attention
(Katharopoulos et al. 2020) without its denominator, which is one more column of v that holds ones.

Shapes: q [B,T,H,K], k [B,T,G,K], v [B,T,G,V], query head h reads kv head h // (H / G); log gates g [B,T,Hs] <= 0 with
Hs = G (state shared by the query heads of a kv head) or H; state s0 [B,Hs,K,V]. States and gates are float32, or
float64 for float64 inputs; o [B,T,H,V] has q's dtype. Letters below: R = H / G, and n = Hs / G, 1 or R.

Decays are exponentials of sums over the steps between two tokens, summed as such and never as a difference of two
running sums: a gate of -80 would leave such a difference without correct digits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._library import accumulation_dtype, define_operator, require

SCHEMA = (
    "gla_chunk(Tensor q, Tensor k, Tensor v, Tensor? g=None, Tensor? s0=None, *, "
    "float scale=1.0, int chunk=64) -> (Tensor o, Tensor s)"
)


def gla_chunk_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The truth: one token at a time, the state held per query head and read back per state head."""
    batch, length, heads, key_dim = q.shape
    state_heads = state_head_count(k, g)
    out_dtype, dtype = q.dtype, accumulation_dtype(q.dtype)
    q = q.to(dtype)
    k, v = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (k, v))
    s = torch.zeros(batch, heads, key_dim, v.shape[3], dtype=dtype, device=q.device)
    if s0 is not None:
        s = s0.to(dtype).repeat_interleave(heads // state_heads, dim=1)
    if g is not None:
        g = g.to(dtype).repeat_interleave(heads // state_heads, dim=2)
    outputs = []
    for t in range(length):
        s = s if g is None else torch.exp(g[:, t])[:, :, None, None] * s
        s = s + k[:, t, :, :, None] * v[:, t, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], s))
    return torch.stack(outputs, dim=1).to(out_dtype), s[:, :: heads // state_heads].contiguous()


def gla_chunk_decomposed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """Standard operators, no loop, T dynamic; quadratic in T, so long inputs are fed in pieces."""
    batch, length, heads, key_dim = q.shape
    kv_heads, value_dim = k.shape[2], v.shape[3]
    group, states = heads // kv_heads, state_head_count(k, g) // kv_heads
    dtype = accumulation_dtype(q.dtype)
    q_BGRTK = (q.to(dtype) * scale).reshape(batch, length, kv_heads, group, key_dim).permute(0, 2, 3, 1, 4)
    k_BG1TK = k.to(dtype).permute(0, 2, 1, 3)[:, :, None]
    v_BGTV = v.to(dtype).permute(0, 2, 1, 3)
    scores = q_BGRTK.reshape(batch, kv_heads, group * length, key_dim) @ k_BG1TK[:, :, 0].transpose(-1, -2)
    scores = scores.reshape(batch, kv_heads, group, length, length)
    if g is None:
        t = torch.arange(length, device=q.device)
        weights = scores.masked_fill(t[:, None] < t[None, :], 0.0)
        entering, leaving, kept = q_BGRTK, k_BG1TK, None
    else:
        g_BGnT = g.to(dtype).permute(0, 2, 1).reshape(batch, kv_heads, states, length)
        spans, elapsed = step_sums(g_BGnT), g_BGnT.cumsum(dim=-1)
        weights = scores * torch.exp(spans)
        entering = q_BGRTK * torch.exp(elapsed)[..., None]
        leaving = k_BG1TK * torch.exp(spans[..., -1, :])[..., None]
        kept = torch.exp(elapsed[..., -1])[..., None, None]
    o = (weights.reshape(batch, kv_heads, group * length, length) @ v_BGTV).reshape(batch, heads, length, value_dim)
    s = leaving.transpose(-1, -2) @ v_BGTV[:, :, None]
    if s0 is not None:
        s0_BGnKV = s0.to(dtype).reshape(batch, kv_heads, states, key_dim, value_dim)
        read = entering.reshape(batch, kv_heads, states, group // states * length, key_dim) @ s0_BGnKV
        o = o + read.reshape(batch, heads, length, value_dim)
        s = s + (s0_BGnKV if kept is None else s0_BGnKV * kept)
    s = s.reshape(batch, kv_heads * states, key_dim, value_dim)
    return o.transpose(1, 2).to(q.dtype).contiguous(), s.contiguous()


def gla_chunk_streamed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    """The decomposed form, `chunk` tokens at a time, the state carried: memory linear in T."""
    outputs, state = [], s0
    for start in range(0, q.shape[1], chunk):
        piece = slice(start, start + chunk)
        gates = None if g is None else g[:, piece]
        o, s = gla_chunk_decomposed(q[:, piece], k[:, piece], v[:, piece], gates, state, scale=scale)
        outputs.append(o)
        state = s
    return torch.cat(outputs, dim=1), s


def step_sums(g: Tensor) -> Tensor:
    """g [..,T] -> [..,T,T]: entry (i, j) is the sum of g over the steps j+1..i, -inf where i < j."""
    t = torch.arange(g.shape[-1], device=g.device)
    after = t[:, None] > t[None, :]
    sums = torch.where(after, g[..., :, None], 0.0).cumsum(dim=-2)
    return sums.masked_fill(t[:, None] < t[None, :], float("-inf"))


def state_head_count(k: Tensor, g: Tensor | None) -> int:
    """Hs: the gates' heads where there are gates, otherwise the kv heads."""
    return k.shape[2] if g is None else g.shape[2]


def check_gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, s0: Tensor | None, name: str = "gla_chunk") -> None:
    """Raise `OperatorError` unless heads, lengths and the state fit together."""
    heads, kv_heads = q.shape[2], k.shape[2]
    states = state_head_count(k, g)
    require(heads % kv_heads == 0, name, f"{heads} query heads are no multiple of {kv_heads} kv heads")
    require(states in (kv_heads, heads), name, f"{states} gates a token: give {kv_heads} or {heads}")
    require(k.shape[1] == q.shape[1] == v.shape[1], name, "q, k and v differ in length")
    require(g is None or g.shape[1] == q.shape[1], name, "g and q differ in length")
    require(s0 is None or s0.shape[1] == states, name, f"s0 must hold {states} heads")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    s0: Tensor | None = None,
    *,
    scale: float = 1.0,
    chunk: int = 64,
) -> tuple[Tensor, Tensor]:
    check_gla(q, k, v, g, s0)
    batch, length, heads, key_dim = q.shape
    state = (batch, state_head_count(k, g), key_dim, v.shape[3])
    return q.new_empty(batch, length, heads, v.shape[3]), q.new_empty(state, dtype=accumulation_dtype(q.dtype))


GLA_CHUNK = define_operator(
    SCHEMA,
    fake=_fake,
    reference=gla_chunk_decomposed,
    recurrence=gla_chunk_recurrence,
    streamed=gla_chunk_streamed,
)
gla_chunk = GLA_CHUNK.overload
