"""DeltaNet (Yang et al. 2024): the delta rule, which corrects what the state says of a key, beside a window softmax.

b_i = sigmoid(x_i W_b + b_b)                                 W_b [D,G]: by token and kv head, from the hidden state
u_i = b_i (v_i - S_{i-1}^T k_i),   S_i = S_{i-1} + k_i u_i^T,   Yfar_i = z_i * S_i^T q_i
y = alpha_h Ynear + beta_h Yfar                              (branches.py; z and the convolutions: short_conv.py)

q, k un-rotated, through the short convolution, then divided by their norms. W_b and b_b start at 0: b_i = 1/2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers.base import register_mixer
from linearize.mixers.branches import only_real_numbers
from linearize.mixers.short_conv import ConvBranches, from_hidden
from linearize.spec import AttentionSpec


@register_mixer
class DeltaNet(ConvBranches):
    __doc__ = ConvBranches.__doc__

    name = "deltanet"

    def __init__(
        self, spec: AttentionSpec, window: int = 64, sinks: int = 0, conv: int = 0, output_gate: bool = False,
        maps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(spec, window, sinks, conv, output_gate, maps)
        self.write = from_hidden(spec, 0.0)

    def log_gates(self, hidden: Tensor, mask: Tensor) -> Tensor | None:
        """[B,T,G], 0 where masked; None for no decay."""
        return None

    def mix(self, tokens: list[Tensor], hidden: Tensor, mask: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        write = only_real_numbers(torch.sigmoid(self.write(hidden)), mask)
        gates = self.log_gates(hidden, mask)
        y, s = torch.ops.linearize.delta_chunk.default(*tokens, write, gates, s, l2norm=True)
        return y, s
