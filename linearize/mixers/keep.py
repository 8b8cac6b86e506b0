"""Softmax attention kept as it is, with a key-value cache that grows with the context.

y = the operator `linearize::attention` over all keys so far. Equals the teacher, always.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers.base import register_mixer
from linearize.mixers.cached import CachedAttention
from linearize.program import StateTensor
from linearize.spec import AttentionSpec, Site


@register_mixer
class Keep(CachedAttention):
    """State: cache_k [G,S,d], cache_v [G,S,dv], cache_mask [S]; S is the number of tokens seen."""

    name = "keep"
    starts_as = "the teacher"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)  # no options

    @classmethod
    def refusal(cls, site: Site) -> str | None:
        return None

    def state(self) -> tuple[StateTensor, ...]:
        spec = self.spec
        return (
            StateTensor("cache_k", (spec.kv_heads, 0, spec.head_dim), self.dtype, grows=1),
            StateTensor("cache_v", (spec.kv_heads, 0, spec.value_dim), self.dtype, grows=1),
            self.cache_mask,
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """`rest` is (sinks [H], if the spec has them,) mask, positions, *state."""
        *sinks, mask, _positions, cache_k, cache_v, cache_mask = rest
        keys, values = torch.cat([cache_k, key], 2), torch.cat([cache_v, value], 2)
        seen = torch.cat([cache_mask, mask], 1)
        return self.attend(query, keys, values, sinks, seen, mask), keys, values, seen
