"""Gated DeltaNet (Yang et al. 2025, eq. 10): the delta rule with a decay, beside a window softmax.

g_i = -e^{a_g} softplus(x_i W_a + t_g)                       W_a [D,G]: log decay by token and kv head
u_i = b_i (v_i - e^{g_i} S_{i-1}^T k_i),   S_i = e^{g_i} S_{i-1} + k_i u_i^T

All else as in `deltanet`, which is this with g = 0. W_a starts at 0, a_g and t_g where g = -START_RATE: half of what
the state holds is left after about 70 tokens.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from linearize.mixers.base import register_mixer
from linearize.mixers.branches import only_real_numbers
from linearize.mixers.deltanet import DeltaNet
from linearize.mixers.short_conv import from_hidden
from linearize.spec import AttentionSpec

START_RATE = 0.01
SOFTPLUS_IS_ONE = math.log(math.e - 1.0)


@register_mixer
class GatedDeltaNet(DeltaNet):
    __doc__ = DeltaNet.__doc__

    name = "gated_deltanet"

    def __init__(
        self, spec: AttentionSpec, window: int = 64, sinks: int = 0, conv: int = 0, output_gate: bool = False,
        maps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(spec, window, sinks, conv, output_gate, maps)
        self.decay = from_hidden(spec, SOFTPLUS_IS_ONE)
        self.log_rate = nn.Parameter(torch.full((spec.kv_heads,), math.log(START_RATE)))

    def log_gates(self, hidden: Tensor, mask: Tensor) -> Tensor | None:
        return only_real_numbers(-torch.exp(self.log_rate) * nn.functional.softplus(self.decay(hidden)), mask)
