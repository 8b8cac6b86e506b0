"""Sliding-window softmax with sink tokens: the honest zero-training baseline (StreamingLLM, Xiao et al. 2023).

y_i = sum_{j in W(i) u S} e^{s_ij} v_j / sum_{j in W(i) u S} e^{s_ij},   s_ij = scale q_i.k_j (rotated q, k)

W(i) the last `window` tokens, itself included; S the row's first `sinks` tokens. No parameters: it equals the
teacher's attention with the mask causal(i, j) and (i - j < window or j < sinks), and the teacher itself while
T <= window + sinks. Sinks stay at their distance in the text; with the paper's positions it is the mixer `streaming`.
"""

from __future__ import annotations

from torch import Tensor

from linearize.mixers.base import Mixer, register_mixer, tokens_first
from linearize.mixers.delay_line import DelayLine
from linearize.program import StateTensor
from linearize.spec import AttentionSpec


@register_mixer
class Window(Mixer):
    """State: the delay line, (window + sinks) x kv_heads x (head_dim + value_dim) numbers a row."""

    name = "window"
    starts_as = "the teacher's softmax over the last `window` keys and the first `sinks`"

    def __init__(self, spec: AttentionSpec, window: int = 64, sinks: int = 0) -> None:
        super().__init__(spec, window=window, sinks=sinks)
        self.line = DelayLine(spec, window, sinks)

    def state(self) -> tuple[StateTensor, ...]:
        return self.line.state()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, positions: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        tokens = (tokens_first(query), tokens_first(key), tokens_first(value), mask, positions)
        o, line, _, _ = self.line.attend(tokens, state)
        return (tokens_first(o), *line)
