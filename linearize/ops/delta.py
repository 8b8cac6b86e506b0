"""`linearize::delta_chunk`, the (gated) delta rule: a token corrects what the state says of its key.

    S_t = e^{g_t} S_{t-1} + k_t u_t^T,   u_t = b_t (v_t - e^{g_t} S_{t-1}^T k_t),   o_t = scale q_t^T S_t

Gated DeltaNet (Yang et al. 2025, eq. 10); g = None is DeltaNet (Yang et al. 2024). Shapes: q [B,T,H,K], k [B,T,G,K],
v [B,T,G,V], query head h reads kv head h // (H / G); b (`beta`) in [0, 2] and log gates g <= 0 are [B,T,Hs] with
Hs = G (state shared by the query heads of a kv head) or H; state s0 [B,Hs,K,V]. `l2norm` divides q and k by their
norms: the rule is a contraction only while b |k|^2 <= 2. A token with k = 0, b = 0 and g = 0 leaves the state as it is.
States and gates are float32, or float64 for float64 inputs; o [B,T,H,V] has q's dtype. Letters below: R = H / G,
n = Hs / G, r = R / n.

Within a piece (WY / UT form), D_ij = e^{g_{j+1} + .. + g_i} and L_ij = b_i D_ij k_i.k_j below the diagonal:
    (I + L) u = b (v - e^{g_1 + .. + g_i} k S),   o = e^{g_1 + .. + g_i} q S + (q k^T * D) u
The inverse of I + L is made from those of its diagonal blocks, twice as large at each of log2 T levels. Powers of L
(a Neumann product) are exact on paper as well, but reach 10^18 on 64 equal keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._library import accumulation_dtype, define_operator, require
from linearize.ops.gla import step_sums

SCHEMA = (
    "delta_chunk(Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? g=None, Tensor? s0=None, *, "
    "float scale=1.0, int chunk=32, bool l2norm=False) -> (Tensor o, Tensor s)"
)
NORM_EPSILON = 1e-6
EXPORTED_LEVELS = 8  # T <= 256 a call where T is symbolic; NaN beyond, never a wrong number


def delta_recurrence(
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
    """The truth: one token at a time, the state held per query head and read back per state head."""
    batch, length, heads, key_dim = q.shape
    shared = heads // beta.shape[2]
    out_dtype, dtype = q.dtype, accumulation_dtype(q.dtype)
    q, k = (normalised(x.to(dtype), l2norm) for x in (q, k))
    g = torch.zeros_like(beta) if g is None else g
    q, k, v, beta, g = (x.to(dtype).repeat_interleave(heads // x.shape[2], dim=2) for x in (q, k, v, beta, g))
    s = torch.zeros(batch, heads, key_dim, v.shape[3], dtype=dtype, device=q.device)
    if s0 is not None:
        s = s0.to(dtype).repeat_interleave(shared, dim=1)
    outputs = []
    for t in range(length):
        s = torch.exp(g[:, t])[:, :, None, None] * s
        known = torch.einsum("bhkv,bhk->bhv", s, k[:, t])
        u = beta[:, t, :, None] * (v[:, t] - known)
        s = s + k[:, t, :, :, None] * u[:, :, None, :]
        outputs.append(scale * torch.einsum("bhk,bhkv->bhv", q[:, t], s))
    return torch.stack(outputs, dim=1).to(out_dtype), s[:, ::shared].contiguous()


def delta_decomposed(
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
    """Standard operators, no loop over tokens, T dynamic; quadratic in T, so long inputs are fed in pieces."""
    batch, length, heads, key_dim = q.shape
    kv_heads, value_dim, states = k.shape[2], v.shape[3], beta.shape[2] // k.shape[2]
    shared, dtype = heads // beta.shape[2], accumulation_dtype(q.dtype)
    q_BGnrTK = normalised(q.to(dtype), l2norm) * scale
    q_BGnrTK = q_BGnrTK.reshape(batch, length, kv_heads, states, shared, key_dim).permute(0, 2, 3, 4, 1, 5)
    k_BG1TK = normalised(k.to(dtype), l2norm).permute(0, 2, 1, 3)[:, :, None]
    v_BG1TV = v.to(dtype).permute(0, 2, 1, 3)[:, :, None]
    beta_BGnT1, g_BGnT = (
        (torch.zeros_like(beta) if x is None else x).to(dtype).permute(0, 2, 1).reshape(batch, kv_heads, states, length)
        for x in (beta, g)
    )
    beta_BGnT1 = beta_BGnT1[..., None]
    spans, elapsed = torch.exp(step_sums(g_BGnT)), torch.exp(g_BGnT.cumsum(dim=-1))[..., None]
    s0_BGnKV = None if s0 is None else s0.to(dtype).reshape(batch, kv_heads, states, key_dim, value_dim)
    k_BG1KT = k_BG1TK.transpose(-1, -2)
    u = beta_BGnT1 * (v_BG1TV if s0_BGnKV is None else v_BG1TV - (k_BG1TK * elapsed) @ s0_BGnKV)
    u = unit_triangular_inverse(beta_BGnT1 * spans * (k_BG1TK @ k_BG1KT)) @ u
    rows = (batch, kv_heads, states, shared * length)
    scores = (q_BGnrTK.reshape(*rows[:2], states * shared * length, key_dim) @ k_BG1KT[:, :, 0]).reshape(
        batch, kv_heads, states, shared, length, length
    )
    o = (scores * spans[:, :, :, None]).reshape(*rows, length) @ u
    s = (k_BG1KT * spans[..., -1:, :]) @ u
    if s0_BGnKV is not None:
        o = o + (q_BGnrTK * elapsed[:, :, :, None]).reshape(*rows, key_dim) @ s0_BGnKV
        s = s + elapsed[..., -1:, :] * s0_BGnKV
    o = o.reshape(batch, heads, length, value_dim).transpose(1, 2)
    return o.to(q.dtype).contiguous(), s.reshape(batch, kv_heads * states, key_dim, value_dim).contiguous()


def delta_streamed(
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
    """The decomposed form, `chunk` tokens at a time, the state carried: memory linear in T."""
    outputs, state = [], s0
    for start in range(0, q.shape[1], chunk):
        part = slice(start, start + chunk)
        tokens = (q[:, part], k[:, part], v[:, part], beta[:, part], None if g is None else g[:, part])
        o, state = delta_decomposed(*tokens, state, scale=scale, l2norm=l2norm)
        outputs.append(o)
    assert state is not None
    return torch.cat(outputs, dim=1), state


def normalised(x: Tensor, l2norm: bool) -> Tensor:
    """x / |x| over the last dim where asked; 0 stays 0."""
    return x * torch.rsqrt(x.square().sum(dim=-1, keepdim=True) + NORM_EPSILON) if l2norm else x


def unit_triangular_inverse(lower: Tensor) -> Tensor:
    """(I + tril(lower, -1))^-1 of [..,T,T], from the inverses X of its diagonal blocks: with E the part of `lower` in
    blocks of twice the size but not in these, E X E = 0, so the larger blocks' inverse is X - X E X exactly."""
    length = lower.shape[-1]
    known = isinstance(length, int)
    t = torch.arange(length, device=lower.device)
    inverse = torch.eye(length, dtype=lower.dtype, device=lower.device).expand(lower.shape)
    inside = t[:, None] == t[None, :]
    for level in range(1, (max(length - 1, 0).bit_length() if known else EXPORTED_LEVELS) + 1):
        block = t // 2**level
        wider = block[:, None] == block[None, :]
        added = lower.masked_fill(~wider | inside | (t[:, None] < t[None, :]), 0.0)
        inverse = inverse - inverse @ added @ inverse if level > 1 else inverse - added
        inside = wider
    return inverse if known else inverse.masked_fill((t >= 2**EXPORTED_LEVELS)[:, None], float("nan"))


def check_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    g: Tensor | None,
    s0: Tensor | None,
    name: str = "delta_chunk",
) -> None:
    """Raise `OperatorError` unless heads, lengths and the state fit together."""
    heads, kv_heads, states = q.shape[2], k.shape[2], beta.shape[2]
    require(heads % kv_heads == 0, name, f"{heads} query heads are no multiple of {kv_heads} kv heads")
    require(states in (kv_heads, heads), name, f"beta for {states} heads: give {kv_heads} or {heads}")
    require(g is None or g.shape[2] == states, name, f"g must hold {states} heads, as beta does")
    require(k.shape[1] == q.shape[1] == v.shape[1] == beta.shape[1], name, "q, k, v and beta differ in length")
    require(g is None or g.shape[1] == q.shape[1], name, "g and q differ in length")
    require(s0 is None or s0.shape[1] == states, name, f"s0 must hold {states} heads")


def _fake(
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
    check_delta(q, k, v, beta, g, s0)
    batch, length, heads, key_dim = q.shape
    state = (batch, beta.shape[2], key_dim, v.shape[3])
    return q.new_empty(batch, length, heads, v.shape[3]), q.new_empty(state, dtype=accumulation_dtype(q.dtype))


DELTA_CHUNK = define_operator(
    SCHEMA,
    fake=_fake,
    reference=delta_decomposed,
    recurrence=delta_recurrence,
    streamed=delta_streamed,
)
delta_chunk = DELTA_CHUNK.overload
