"""Chunked eviction (CItruS, Bai et al. 2024, arXiv 2406.12018): the attention of each chunk says what stays.

    y_i = softmax over the last w .. 2w - 1 tokens and the C older ones with the largest score a_j
    a_j = sum_{i in chunk} softmax(s_i.)_j           summed over the query heads of a kv head, too

A document is read in chunks (blocks of `window` tokens); after each, the keys and values to which its queries gave the
most weight stay, the chunk itself always: the paper's "standard chunk eviction". Its instruction-aware form lets the
queries of an instruction vote that is placed behind every chunk; here the chunk's own do, as a graph that is fed
token by token knows of no instruction.

`memory` is what is left of the scores at a chunk's end. 0 is CItruS. With 1 they add up over all queries so far: the
heavy hitters of H2O (Zhang et al. 2023, arXiv 2306.14048), evicted by block where H2O evicts at each token.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from linearize.mixers.base import register_mixer
from linearize.mixers.evicting import Evicting
from linearize.program import StateTensor
from linearize.spec import AttentionSpec


@register_mixer
class Citrus(Evicting):
    """State: the ring and the kept tokens, (2w + C) x kv_heads x (d + dv) numbers, and their scores mass [G,C+2w] in
    float32."""

    name = "citrus"
    starts_as = "the teacher's softmax over the last block or two of `window` and the `keep` most attended older tokens"

    def __init__(
        self, spec: AttentionSpec, window: int = 32, keep: int = 128, sinks: int = 0, memory: float = 0.0
    ) -> None:
        super().__init__(spec, window, keep, sinks, memory=memory)
        if not 0 <= memory <= 1:
            raise ValueError(f"memory must be in [0, 1], not {memory}")
        self.memory = memory

    def state(self) -> tuple[StateTensor, ...]:
        mass = StateTensor("mass", (self.spec.kv_heads, self.keep + 2 * self.window), self._wide())
        return (*super().state(), mass)

    def deciding(self, rest: tuple[Tensor, ...]) -> dict[str, Any]:
        return {"mass": rest[0], "memory": self.memory}
