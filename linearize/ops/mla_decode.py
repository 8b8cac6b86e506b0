"""`linearize::mla_decode`: one query a row over a cache of latents, the keys' up-projection absorbed in the queries.

    p_j = scale q_h . c_j   for j < lens,      o_h = sum_j softmax(p)_j c_j[:R],      lse_h = log sum_j e^{p_j}

DeepSeek-V2 (arXiv 2405.04434, section 2.1): q [B,H,R+P] holds the absorbed part and the P rotated dims, `cache`
[B,L,R+P] a latent and a rotated key by token, shared by all heads; the value is the latent, so o [B,H,R] has `rank` R
columns and is projected up afterwards. `lens` int64 [B]: the tokens that a row has, in front; None: all L. A row
without any gives 0 and lse -inf. lse [B,H] is float32 (float64 for float64 inputs): with it, parts of a cache are read
apart and joined (split-KV). Prefill is `attention` on the heads' own keys.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._library import accumulation_dtype, define_operator, require

SCHEMA = "mla_decode(Tensor q, Tensor cache, Tensor? lens=None, *, int rank, float scale) -> (Tensor o, Tensor lse)"


def mla_decode_recurrence(
    q: Tensor, cache: Tensor, lens: Tensor | None = None, *, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """The truth: one row at a time, its own tokens alone."""
    dtype, outputs, masses = accumulation_dtype(q.dtype), [], []
    for b in range(q.shape[0]):
        own = cache[b, : cache.shape[1] if lens is None else int(lens[b])].to(dtype)
        scores = scale * q[b].to(dtype) @ own.T
        outputs.append(torch.softmax(scores, dim=-1) @ own[:, :rank])
        masses.append(torch.logsumexp(scores, dim=-1))
    return torch.stack(outputs).to(q.dtype), torch.stack(masses)


def mla_decode_decomposed(
    q: Tensor, cache: Tensor, lens: Tensor | None = None, *, rank: int, scale: float
) -> tuple[Tensor, Tensor]:
    """Standard operators, L dynamic."""
    check_mla(q, cache, lens, rank)
    dtype = accumulation_dtype(q.dtype)
    wide = cache.to(dtype)
    scores = (q.to(dtype) * scale) @ wide.transpose(1, 2)
    if lens is not None:
        column = torch.arange(cache.shape[1], device=q.device)
        scores = scores.masked_fill((column >= lens[:, None])[:, None], float("-inf"))
    top = scores.amax(dim=-1, keepdim=True)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    mass = weights.sum(dim=-1, keepdim=True)
    o = (weights @ wide[..., :rank]) / mass.masked_fill(mass == 0, 1.0)
    return o.to(q.dtype), (torch.log(mass) + top).squeeze(-1)


def check_mla(q: Tensor, cache: Tensor, lens: Tensor | None, rank: int) -> None:
    """Raise `OperatorError` unless queries and cache have the same dims, of which `rank` are the latent's."""
    name = "mla_decode"
    require(q.ndim == 3 == cache.ndim, name, "q must be [B,H,R+P] and cache [B,L,R+P]")
    require(q.shape[2] == cache.shape[2], name, f"q has {q.shape[2]} dims, the cache {cache.shape[2]}")
    require(0 < rank <= q.shape[2], name, f"rank is {rank}, of {q.shape[2]} dims")
    require(lens is None or (lens.ndim == 1 and lens.dtype == torch.int64), name, "lens must be int64 of [B]")


def _fake(q: Tensor, cache: Tensor, lens: Tensor | None = None, *, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    check_mla(q, cache, lens, rank)
    return q.new_empty(*q.shape[:2], rank), q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype))


MLA_DECODE = define_operator(
    SCHEMA,
    fake=_fake,
    reference=mla_decode_decomposed,
    recurrence=mla_decode_recurrence,
    streamed=mla_decode_decomposed,
)
mla_decode = MLA_DECODE.overload
