"""Gated linear attention (GLA, Yang et al. 2024), gates by channel from the hidden state, with a window beside it.

phi(x) = softmax over f of x W, un-rotated                  W_q [H,d,f], W_k [G,d,f], start: the identity
G_i = sigmoid(x_i W_1 W_2 + b)^{1/16}                       W_1 [D,rank], W_2 [rank,G f]: a gate by channel and kv head
S_i = diag(G_i) S_{i-1} + phi(k_i) v_i^T,   Yfar_i = phi(q_i)^T S_i
y = alpha_h Ynear + beta_h Yfar                             (branches.py)

The paper has phi = identity and an output norm, which a model trained from scratch grows around; positive features keep
Yfar near what softmax attention gives. W_2 starts at 0 and b at START_GATE: all channels then keep a token alike.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.mixers.base import register_mixer
from linearize.mixers.branches import Far, TwoBranches, log_sigmoid, only_real
from linearize.mixers.lolcats import start_map
from linearize.program import StateTensor
from linearize.spec import AttentionSpec

GATE_DIVISOR = 16.0
START_GATE = 2.0  # sigmoid(2)^(1/16) = 0.992: half a token's weight is left after about 90 tokens


@register_mixer
class Gla(TwoBranches):
    """Options: `window` (0: none), `sinks`; `features` f (0 means head_dim); `rank` of the gates; `maps`.

    State: the delay line and s [G,f,dv].
    """

    name = "gla"
    needs = ("query_unrotated", "key_unrotated", "hidden")

    def __init__(
        self, spec: AttentionSpec, window: int = 64, sinks: int = 0, features: int = 0, rank: int = 16,
        maps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(spec, window, sinks, maps=maps, features=features, rank=rank)
        self.features = features or spec.head_dim
        self.query_map = nn.Parameter(start_map(spec.heads, spec.head_dim, self.features))
        self.key_map = nn.Parameter(start_map(spec.kv_heads, spec.head_dim, self.features))
        self.gate_in = nn.Linear(spec.hidden_dim, rank, bias=False)
        self.gate_out = nn.Linear(rank, spec.kv_heads * self.features)
        nn.init.normal_(self.gate_in.weight, std=spec.hidden_dim**-0.5, generator=torch.Generator().manual_seed(0))
        nn.init.zeros_(self.gate_out.weight)
        nn.init.constant_(self.gate_out.bias, START_GATE)

    def far_state(self) -> tuple[StateTensor, ...]:
        return (StateTensor("s", (self.spec.kv_heads, self.features, self.spec.value_dim)),)

    def far(self, x: dict[str, Tensor], state: tuple[Tensor, ...]) -> Far:
        mask = x["mask"]
        gates = log_sigmoid(self.gate_out(self.gate_in(self.working(x["hidden"])))) / GATE_DIVISOR
        y, s = torch.ops.linearize.gla_vec_chunk.default(
            self._features(x["query_unrotated"], self.query_map),
            only_real(self._features(x["key_unrotated"], self.key_map), mask),
            self.working(x["value"]),
            only_real(gates.unflatten(-1, (self.spec.kv_heads, self.features)), mask), state[0],
        )  # fmt: skip
        return y, (s,)

    def _features(self, x: Tensor, weight: Tensor) -> Tensor:
        return torch.softmax(torch.einsum("bthd,hdf->bthf", self.working(x), weight), dim=-1)
