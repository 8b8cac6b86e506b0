"""Softmax attention kept as it is, with a key-value cache that grows with the context.

y = the operator `linearize::attention` over all keys so far. Equals the teacher, always.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers.base import Mixer, register_mixer
from linearize.ops.position_bias import position_bias
from linearize.program import StateTensor
from linearize.spec import AttentionSpec, Site


@register_mixer
class Keep(Mixer):
    """State: cache_k [G,S,d], cache_v [G,S,dv], cache_mask [S]; S is the number of tokens seen."""

    name = "keep"
    starts_as = "the teacher"
    slopes: Tensor

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)
        if spec.alibi:
            self.register_buffer("slopes", torch.tensor(spec.alibi, dtype=torch.float32))
        self.needs = ("sinks",) if spec.sinks else ()  # type: ignore[misc]

    @classmethod
    def refusal(cls, site: Site) -> str | None:
        return None

    def state(self) -> tuple[StateTensor, ...]:
        spec = self.spec
        return (
            StateTensor("cache_k", (spec.kv_heads, 0, spec.head_dim), self.dtype, grows=1),
            StateTensor("cache_v", (spec.kv_heads, 0, spec.value_dim), self.dtype, grows=1),
            StateTensor("cache_mask", (0,), torch.bool, grows=0),
        )

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """`rest` is (sinks [H], if the spec has them,) mask, positions, *state."""
        *sinks, mask, _positions, cache_k, cache_v, cache_mask = rest
        keys, values = torch.cat([cache_k, key], 2), torch.cat([cache_v, value], 2)
        seen = torch.cat([cache_mask, mask], 1)
        output = torch.ops.linearize.attention.default(
            query, keys, values, self._bias(seen, mask), *sinks,
            scale=self.spec.scale, softcap=self.spec.softcap, causal=True,
            window=self.spec.mask.size if self.spec.mask.kind == "sliding" else 0,
        )  # fmt: skip
        return output, keys, values, seen

    def _bias(self, seen: Tensor, mask: Tensor) -> Tensor:
        masked = self.spec.mask
        chunk = masked.size if masked.kind == "chunked" else 0
        if not chunk and not self.spec.alibi:
            return seen.unsqueeze(1).unsqueeze(1)
        slopes = self.slopes if self.spec.alibi else None
        return position_bias(seen, mask, chunk, slopes, from_first_token=masked.from_first_token)
