"""Lightning attention (Qin et al. 2024): linear attention with one constant decay per head, beside a window softmax.

phi(x) = softmax over d of x, un-rotated
S_i = e^{-r_g} S_{i-1} + phi(k_i) v_i^T,   Yfar_i = phi(q_i)^T S_i          r_g = 2^{-8 (g + 1) / G} by kv head g
y = alpha_h Ynear + beta_h Yfar                                              (branches.py)

The slopes are ALiBi's (Press et al. 2022), as in TransNormer and MiniMax-01, by kv head because the state is kept
there. `fit_decay` makes log r_g a parameter.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.mixers.base import register_mixer
from linearize.mixers.branches import Far, TwoBranches, only_real
from linearize.program import StateTensor
from linearize.spec import AttentionSpec


@register_mixer
class Lightning(TwoBranches):
    """Options: `window` (0: none), `sinks`; `fit_decay`; `maps`.

    State: the delay line and s [G,d,dv].
    """

    name = "lightning"
    needs = ("query_unrotated", "key_unrotated")
    log_rate: Tensor

    def __init__(
        self, spec: AttentionSpec, window: int = 64, sinks: int = 0, fit_decay: bool = False, maps: bool = False
    ) -> None:
        super().__init__(spec, window, sinks, maps=maps, fit_decay=fit_decay)
        heads = torch.arange(1, spec.kv_heads + 1, dtype=torch.float32)
        log_rate = -8.0 * heads / spec.kv_heads * torch.log(torch.tensor(2.0))
        if fit_decay:
            self.log_rate = nn.Parameter(log_rate)
        else:
            self.register_buffer("log_rate", log_rate)

    def far_state(self) -> tuple[StateTensor, ...]:
        return (StateTensor("s", (self.spec.kv_heads, self.spec.head_dim, self.spec.value_dim)),)

    def far(self, x: dict[str, Tensor], state: tuple[Tensor, ...]) -> Far:
        query, key, mask = self.working(x["query_unrotated"]), self.working(x["key_unrotated"]), x["mask"]
        gates = self.working(mask.unsqueeze(-1)) * -torch.exp(self.log_rate)
        y, s = torch.ops.linearize.gla_chunk.default(
            torch.softmax(query, dim=-1), only_real(torch.softmax(key, dim=-1), mask),
            self.working(x["value"]), gates, state[0],
        )  # fmt: skip
        return y, (s,)
