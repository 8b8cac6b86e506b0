"""Softmax attention kept as it is, with a key-value cache that grows with the context.

y = the operator `linearize::attention` over all keys so far. Equals the teacher, always.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers.base import Mixer, register_mixer
from linearize.program import StateTensor
from linearize.spec import AttentionSpec, Site


@register_mixer
class Keep(Mixer):
    """State: cache_k [G,S,d], cache_v [G,S,dv], cache_mask [S]; S is the number of tokens seen."""

    name = "keep"
    starts_as = "the teacher"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)

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

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, positions: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        keys, values = torch.cat([state[0], key], 2), torch.cat([state[1], value], 2)
        seen = torch.cat([state[2], mask], 1)
        output = torch.ops.linearize.attention.default(
            query, keys, values, seen.unsqueeze(1).unsqueeze(1),
            scale=self.spec.scale, softcap=self.spec.softcap, causal=True,
            window=self.spec.mask.size if self.spec.mask.kind == "sliding" else 0,
        )  # fmt: skip
        return output, keys, values, seen
