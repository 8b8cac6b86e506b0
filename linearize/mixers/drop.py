"""Attention removed (LLM-Drop, He et al. 2024): the block's residual stream passes by.

y = 0. No state, no parameters; queries, keys and values are no longer computed. Any attention can be dropped. Of the
block nothing is left but the bias of its output projection, where it has one (GPT-2, OPT; not in its paper):
the paper drops norm and projection with the attention. Chosen where attention changes its block's input least:
S_l = mean over tokens of cos(x, x + Attn(norm x)), see `calibration/scores.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers.base import Mixer, register_mixer
from linearize.program import StateTensor
from linearize.spec import AttentionSpec, Site


@register_mixer
class Drop(Mixer):
    """State: none."""

    name = "drop"
    starts_as = "nothing: its output is 0"

    def __init__(self, spec: AttentionSpec) -> None:
        super().__init__(spec)

    @classmethod
    def refusal(cls, site: Site) -> str | None:
        return None

    def state(self) -> tuple[StateTensor, ...]:
        return ()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, positions: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        """Zeros made from the mask alone, so that nothing before the attention is needed any more."""
        zeros = torch.zeros_like(mask, dtype=self.dtype)
        return (zeros.unsqueeze(1).unsqueeze(-1).expand(-1, self.spec.heads, -1, self.spec.value_dim),)
