"""Mamba-2 (SSD, Dao and Gu 2024) from attention weights, beside a window softmax: x <- v, B <- k, C <- q.

D_i = softplus(x_i W_t + t_g)                                W_t [D,G]: the step, by token and kv head
S_i = e^{-D_i e^{a_g}} S_{i-1} + D_i k_i v_i^T               (eq. 16 with A_g = -e^{a_g})
Yfar_i = z_i * ( scale S_i^T q_i + d_h v_i )
y = alpha_h Ynear + beta_h Yfar                              (branches.py; z and the convolutions: short_conv.py)

q, k un-rotated, through the short convolution as v is. At the start D_i = 1, A = -START_RATE and d = 0. Gates and
states are kept by kv head (the paper: a gate by query head over shared B and C).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linearize.mixers.base import register_mixer
from linearize.mixers.branches import only_real_numbers
from linearize.mixers.gated_deltanet import SOFTPLUS_IS_ONE, START_RATE
from linearize.mixers.short_conv import ConvBranches, from_hidden
from linearize.spec import AttentionSpec


@register_mixer
class Mamba2(ConvBranches):
    __doc__ = ConvBranches.__doc__

    name = "mamba2"

    def __init__(
        self, spec: AttentionSpec, window: int = 64, sinks: int = 0, conv: int = 4, output_gate: bool = False,
        maps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(spec, window, sinks, conv, output_gate, maps)
        self.time_step = from_hidden(spec, SOFTPLUS_IS_ONE)
        self.log_rate = nn.Parameter(torch.full((spec.kv_heads,), math.log(START_RATE)))
        self.skip = nn.Parameter(torch.zeros(spec.heads))

    def mix(self, tokens: list[Tensor], hidden: Tensor, mask: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        query, key, value = tokens
        step = only_real_numbers(nn.functional.softplus(self.time_step(hidden)), mask)
        y, s = torch.ops.linearize.gla_chunk.default(
            query, key * step.unsqueeze(-1), value, -torch.exp(self.log_rate) * step, s, scale=self.spec.scale
        )
        by_head = value.unsqueeze(3).expand(-1, -1, -1, self.spec.groups, -1).flatten(2, 3)
        return y + self.skip[:, None] * by_head, s
