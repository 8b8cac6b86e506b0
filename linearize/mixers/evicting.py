"""What mixers share that keep a fixed number of tokens beside the recent ones, and evict the others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.mixers.base import Mixer, tokens_first
from linearize.program import StateTensor
from linearize.spec import AttentionSpec


class Evicting(Mixer):
    """Subclasses say what tokens are worth: `deciding` gives the operator its `mass` or its `filters`.

    Options: `window` w, tokens of a block; `keep` C, tokens kept beyond two blocks; `sinks`, first tokens that always
    stay (they take places of `keep`). Equals the teacher while a row has at most keep + window tokens.
    """

    def __init__(self, spec: AttentionSpec, window: int, keep: int, sinks: int, **options: Any) -> None:
        super().__init__(spec, window=window, keep=keep, sinks=sinks, **options)
        if window < 1 or sinks < 0 or keep < max(1, sinks):
            raise ValueError(f"window and keep must be at least 1 and keep at least sinks >= 0: {self.options}")
        self.window, self.keep, self.sinks = window, keep, sinks

    def state(self) -> tuple[StateTensor, ...]:
        """ring_k [2w,G,d], ring_v [2w,G,dv] (rank p at p % 2w), kept_k [G,C,d], kept_v [G,C,dv] in order of rank."""
        spec, columns = self.spec, 2 * self.window
        return (
            StateTensor("ring_k", (columns, spec.kv_heads, spec.head_dim), self.dtype),
            StateTensor("ring_v", (columns, spec.kv_heads, spec.value_dim), self.dtype),
            StateTensor("kept_k", (spec.kv_heads, self.keep, spec.head_dim), self.dtype),
            StateTensor("kept_v", (spec.kv_heads, self.keep, spec.value_dim), self.dtype),
        )

    def deciding(self, rest: tuple[Tensor, ...]) -> dict[str, Any]:
        """`mass` or `filters`, and `memory`, for the operator; `rest` is what the subclass adds to the state."""
        raise NotImplementedError

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, positions: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        before = positions[:, 0] + 1 - mask[:, 0].to(torch.int64)
        o, ring_k, ring_v, kept_k, kept_v, mass = torch.ops.linearize.evict_chunk.default(
            tokens_first(query), tokens_first(key), tokens_first(value), mask, before, *state[:4],
            window=self.window, scale=self.spec.scale, sinks=self.sinks, **self.deciding(state[4:]),
        )  # fmt: skip
        return (tokens_first(o), ring_k, ring_v, kept_k, kept_v, mass)[: 1 + len(state)]

    def _wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32
