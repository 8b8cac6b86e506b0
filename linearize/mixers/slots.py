"""Merged slots: softmax over recent blocks of keys and over C slots that stand for all the keys before them.

           sum_{j in W(i)} e^{s_ij} v_j + sum_c n_c e^{s_ic} v_c
    y_i = ------------------------------------------------------        s_ij = scale q_i.k_j (rotated q, k)
           sum_{j in W(i)} e^{s_ij}     + sum_c n_c e^{s_ic}

W(i) is the query's own block of `window` tokens up to itself and the block before it: window .. 2 window - 1 keys
before the query. A slot is the count n_c, mean key k_c and mean value v_c of the tokens merged into it. When a block is
complete, the one before it joins the slots and the pairs whose keys are closest (Ward's cost, see
`linearize.ops.slot_merge`) merge until C slots are left, once every `window` tokens.

No parameters and no fitting: it equals the teacher exactly while a row has at most slots + window tokens, and loses
only what merging unlike keys loses after that. Positive weights, one normaliser, no feature map.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers.base import Mixer, register_mixer, tokens_first
from linearize.program import StateTensor
from linearize.spec import AttentionSpec


@register_mixer
class Slots(Mixer):
    """Options: `window` w, tokens of a block; `slots` C; `sinks`, first tokens that are never merged (they take
    slots); `rounds` of merging a block, more being closer to merging the cheapest pair again and again; `decay`, what
    is left of the slots' counts at each block once all slots are taken (1: nothing is forgotten by age).

    State, of fixed size: two blocks of keys and values, and C (d + dv + 1) numbers a kv head in float32.
    """

    name = "slots"
    starts_as = "the teacher's softmax, with keys and values beyond two blocks averaged in `slots` clusters"

    def __init__(
        self, spec: AttentionSpec, window: int = 32, slots: int = 128, sinks: int = 0, rounds: int = 4,
        decay: float = 1.0,
    ) -> None:  # fmt: skip
        super().__init__(spec, window=window, slots=slots, sinks=sinks, rounds=rounds, decay=decay)
        if window < 1 or rounds < 1 or sinks < 0:
            raise ValueError(f"window and rounds must be at least 1 and sinks at least 0: {self.options}")
        if slots < max(1, 2 * sinks):
            raise ValueError(f"slots must be at least 1 and twice the {sinks} sinks, not {slots}")
        if not 0 < decay <= 1:
            raise ValueError(f"decay must be above 0 and at most 1, not {decay}")
        self.window, self.slots, self.sinks, self.rounds, self.decay = window, slots, sinks, rounds, decay

    def state(self) -> tuple[StateTensor, ...]:
        """ring_k [2w,G,d], ring_v [2w,G,dv] (rank p at p % 2w), slot_k [G,C,d], slot_v [G,C,dv], slot_n [G,C]."""
        spec, columns = self.spec, 2 * self.window
        return (
            StateTensor("ring_k", (columns, spec.kv_heads, spec.head_dim), self.dtype),
            StateTensor("ring_v", (columns, spec.kv_heads, spec.value_dim), self.dtype),
            StateTensor("slot_k", (spec.kv_heads, self.slots, spec.head_dim), self._wide()),
            StateTensor("slot_v", (spec.kv_heads, self.slots, spec.value_dim), self._wide()),
            StateTensor("slot_n", (spec.kv_heads, self.slots), self._wide()),
        )

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, positions: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        before = positions[:, 0] + 1 - mask[:, 0].to(torch.int64)
        o, ring_k, ring_v, slot_k, slot_v, slot_n = torch.ops.linearize.slots_chunk.default(
            tokens_first(query), tokens_first(key), tokens_first(value), mask, before, *state,
            window=self.window, scale=self.spec.scale, sinks=self.sinks, rounds=self.rounds,
            decay=self.decay,
        )  # fmt: skip
        return tokens_first(o), ring_k, ring_v, slot_k, slot_v, slot_n

    def _wide(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32
