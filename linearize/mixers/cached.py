"""What mixers share that run softmax attention over a cache of every token so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.mixers.base import Mixer
from linearize.ops.position_bias import position_bias
from linearize.program import StateTensor
from linearize.spec import AttentionSpec


class CachedAttention(Mixer):
    """`attend` is the teacher's attention on keys and values of any width: sinks, soft-cap, window, chunks, ALiBi.

    Part of the state: cache_mask [S], True at real tokens.
    """

    slopes: Tensor
    cache_mask = StateTensor("cache_mask", (0,), torch.bool, grows=0)

    def __init__(self, spec: AttentionSpec, **options: Any) -> None:
        super().__init__(spec, **options)
        if spec.alibi:
            self.register_buffer("slopes", torch.tensor(spec.alibi, dtype=torch.float32))
        if spec.sinks:
            self.needs = (*type(self).needs, "sinks")  # type: ignore[misc]

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, sinks: list[Tensor], seen: Tensor, mask: Tensor
    ) -> Tensor:
        """[B,H,T,d], [B,G,S,d], [B,G,S,dv] -> [B,H,T,dv]; `sinks` holds [H] or nothing; seen [B,S], mask [B,T]."""
        output: Tensor = torch.ops.linearize.attention.default(
            query, keys, values, self._bias(seen, mask), *sinks,
            scale=self.spec.scale, softcap=self.spec.softcap, causal=True,
            window=self.spec.mask.size if self.spec.mask.kind == "sliding" else 0,
        )  # fmt: skip
        return output

    def _bias(self, seen: Tensor, mask: Tensor) -> Tensor:
        masked = self.spec.mask
        chunk = masked.size if masked.kind == "chunked" else 0
        if not chunk and not self.spec.alibi:
            return seen.unsqueeze(1).unsqueeze(1)
        slopes = self.slopes if self.spec.alibi else None
        return position_bias(seen, mask, chunk, slopes, from_first_token=masked.from_first_token)
