"""Multi-head latent attention from any softmax attention: a small cache for all heads in place of one a kv head.

Cached per token: a latent c in R^r and rotated key dims k^R in R^p (DeepSeek-V2, arXiv 2405.04434).
    c_t   = sum_g ( A_g k_tg + B_g v_tg ) + c0                  A_g [d,r], B_g [dv,r], k before the rotation
    k^R_t = sum_g R_g k'_tg                                     R_g [d,p], k' after it
    s_tj  = scale ( (P_h q_t) . c_j + (Q_h q'_t) . k^R_j )      P_h [d,r], Q_h [d,p]: absorbed, no keys by head
    y_t   = U_h sum_j softmax(s)_tj c_j + u_g                   U_h [r,dv], u [G,dv]
One attention with a single kv head of r + p dims, whose values are the first r of its keys: prefill and decode alike.

Why it can equal the teacher: an orthogonal matrix that mixes kv heads within one rotary pair, the same on its real and
imaginary part, commutes with the rotation (TransMLA, arXiv 2502.07864). At full rank nothing is lost. Below it:
    1. a PCA over heads in every pair gathers its energy in a few of the G components;
    2. p / 2 pairs stay rotated: those without whose rotation the teacher's attended scores would change most (mean
       square), so by wavelength and energy at once and not by a fixed slice;
    3. all other key dims, un-rotated, are compressed with the values by a PCA whitened by the queries (a key's error
       counts as the error of the scores it makes); keys against values are balanced by a search on the outputs.
Norms on q or k need no care: un-rotated q and k are taken behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.mixers.base import register_mixer
from linearize.mixers.cached import CachedAttention
from linearize.mixers.mla_basis import Bases, fit_bases, full_bases
from linearize.program import StateTensor
from linearize.spec import AttentionSpec, Site


@register_mixer
class MLA(CachedAttention):
    """Options: `rank` r and `rope_dims` p (even; rounded to what there is); 0 for the share of the teacher's cache that
    `cache` gives: p a third of it, r the rest. cache=1.0 with r = p = 0 is full rank, and equals the teacher.

    State: cache_c [S, r + p] (the latent, then the rotated dims) and cache_mask [S]: it grows by r + p numbers a token.
    """

    name = "mla"
    needs = ("query_unrotated", "key_unrotated")
    starts_as = "the teacher at full rank; below it, a truncation of that (the first dims) until it is fitted"
    fits = True
    down_key: Tensor
    down_value: Tensor
    down_bias: Tensor
    rope_key: Tensor
    latent_query: Tensor
    rope_query: Tensor
    up_value: Tensor
    up_bias: Tensor

    def __init__(self, spec: AttentionSpec, cache: float = 0.5, rank: int = 0, rope_dims: int = 0) -> None:
        super().__init__(spec, cache=cache, rank=rank, rope_dims=rope_dims)
        self.rank, self.rope_dims = _sizes(spec, cache, rank, rope_dims)
        for name, tensor in full_bases(spec, self.rank, self.rope_dims)._asdict().items():
            self.register_parameter(name, nn.Parameter(tensor))

    @classmethod
    def refusal(cls, site: Site) -> str | None:
        missing = cls.missing(site)
        if missing:
            return missing
        if site.attention.rope is not None and site.attention.rope.pairs == "other":
            return f"{cls.name} does not know which dims {site.attention.rope} rotates together"
        return None

    def state(self) -> tuple[StateTensor, ...]:
        width = self.rank + self.rope_dims
        return (
            StateTensor("cache_c", (0, width), self.dtype, grows=0),
            self.cache_mask,
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, query_unrotated: Tensor, key_unrotated: Tensor, *rest: Tensor
    ) -> tuple[Tensor, ...]:
        """`rest` is (sinks [H], if the spec has them,) mask, positions, cache_c, cache_mask."""
        *sinks, mask, _positions, cache, cache_mask = rest
        cache = torch.cat([cache, self._compress(key, value, key_unrotated)], 1)
        seen = torch.cat([cache_mask, mask], 1)
        keys = cache.unsqueeze(1)
        absorbed = self._absorb(query, query_unrotated)
        latent = self.attend(absorbed, keys, keys[..., : self.rank], sinks, seen, mask)
        return self._expand(latent), cache, seen

    def _compress(self, key: Tensor, value: Tensor, key_unrotated: Tensor) -> Tensor:
        """[B, T, r + p]."""
        latent = _over_heads(key_unrotated, self.down_key) + _over_heads(value, self.down_value) + self.down_bias
        return torch.cat([latent, _over_heads(key, self.rope_key)], -1).to(self.dtype)

    def _absorb(self, query: Tensor, query_unrotated: Tensor) -> Tensor:
        """[B, H, T, r + p]."""
        absorbed = [query_unrotated @ self.latent_query.to(query.dtype), query @ self.rope_query.to(query.dtype)]
        return torch.cat(absorbed, -1)

    def _expand(self, latent: Tensor) -> Tensor:
        """[B, H, T, r] -> [B, H, T, dv]."""
        mean = self.up_bias.repeat_interleave(self.spec.groups, 0).unsqueeze(1)
        return latent @ self.up_value.to(latent.dtype) + mean.to(latent.dtype)

    def prepare(self, inputs: list[Tensor], target: Tensor) -> None:
        """The bases of the module docstring, from the statistics of one batch; the balance of keys against values
        is the one of `BALANCES` with the smallest error of the output."""
        query, key, value, plain_query, plain_key = (tensor.double() for tensor in inputs[:5])
        best: tuple[float, Bases] | None = None
        for bases in fit_bases(self.spec, self.rank, self.rope_dims, query, key, value, plain_query, plain_key):
            self._set(bases)
            error = (self.run(inputs).double() - target.double()).square().mean().item()
            if best is None or error < best[0]:
                best = error, bases
        assert best is not None
        self._set(best[1])

    def _set(self, bases: Bases) -> None:
        for name, tensor in bases._asdict().items():
            getattr(self, name).data.copy_(tensor)


def _over_heads(x: Tensor, weight: Tensor) -> Tensor:
    """sum_g x_g W_g: [B,G,T,d], [G,d,n] -> [B,T,n]."""
    return (x.transpose(1, 2).flatten(2)) @ weight.flatten(0, 1).to(x.dtype)


def _sizes(spec: AttentionSpec, cache: float, rank: int, rope_dims: int) -> tuple[int, int]:
    """(r, p) within what the site has."""
    if not 0 < cache <= 1 or rank < 0 or rope_dims < 0 or rope_dims % 2:
        given = f"{cache}, {rank} and {rope_dims}"
        raise ValueError(f"cache must be in (0, 1], rank at least 0 and rope_dims even, not {given}")
    rotated = spec.kv_heads * (spec.rope.rotated_dims if spec.rope else 0)
    everything = spec.kv_heads * (spec.head_dim + spec.value_dim)
    if cache == 1.0 and not rank and not rope_dims:
        return everything - rotated, rotated
    total = max(round(cache * everything), 2)
    p = min(rope_dims or 2 * round(total / 6), rotated)
    return min(rank or max(total - p, 1), everything - p), p
