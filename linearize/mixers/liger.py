"""Liger (Lan et al. 2025): gated linear attention whose gates come from the keys, beside a window softmax.

phi(x) = softmax over d of x, un-rotated                   no parameters
G_i = sigmoid(pool(k_i))^{1/16}                             a gate by channel of the key: no new gate parameters
S_i = diag(G_i) S_{i-1} + phi(k_i) v_i^T,   Yfar_i = phi(q_i)^T S_i
y = alpha_h Ynear + beta_h Yfar                             (branches.py)

The paper has alpha = beta = 0.5 and then trains the model: `liger{near=0.5, far=0.5}` gives that start, half the window
softmax plus half a linear term that has no denominator, which is no function of the teacher: on the embedded model its
relative MSE is 14.9, 0.47, 0.34 and 0.68 by layer, the window's 0.018, 0.50, 0.077 and 0.013. Here alpha starts at 1
and beta at 0. pool is the mean over `pool` adjacent channels; 1 is the identity, as in three of the reference's
classes.

Differences from the reference code, on purpose: the window holds `window` keys in decode too (the reference: one), the
positions are the tokens' own (the reference: the head count), and q/k norms are kept (the reference drops Qwen3's),
because the un-rotated q and k are taken behind them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers.base import register_mixer
from linearize.mixers.branches import Far, TwoBranches, log_sigmoid, only_real
from linearize.program import StateTensor
from linearize.spec import AttentionSpec

GATE_DIVISOR = 16.0


@register_mixer
class Liger(TwoBranches):
    """Options: `window`, `sinks`; `near` and `far`, the starts of alpha and beta; `pool`, channels a gate; `maps`.

    State: the delay line and s [G,d,dv].
    """

    name = "liger"
    needs = ("query_unrotated", "key_unrotated")

    def __init__(
        self, spec: AttentionSpec, window: int = 64, sinks: int = 0, near: float = 1.0, far: float = 0.0, pool: int = 1,
        maps: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(spec, window, sinks, near, far, maps, pool=pool)
        self.options |= {"near": near, "far": far}
        if pool < 1 or spec.head_dim % pool:
            raise ValueError(f"pool must divide the head dim {spec.head_dim}, which {pool} does not")
        self.pool = pool

    def far_state(self) -> tuple[StateTensor, ...]:
        return (StateTensor("s", (self.spec.kv_heads, self.spec.head_dim, self.spec.value_dim)),)

    def far(self, x: dict[str, Tensor], state: tuple[Tensor, ...]) -> Far:
        query, key, mask = self.working(x["query_unrotated"]), self.working(x["key_unrotated"]), x["mask"]
        gates = only_real(log_sigmoid(self._pooled(key)) / GATE_DIVISOR, mask)
        y, s = torch.ops.linearize.gla_vec_chunk.default(
            torch.softmax(query, dim=-1), only_real(torch.softmax(key, dim=-1), mask),
            self.working(x["value"]), gates, state[0],
        )  # fmt: skip
        return y, (s,)

    def _pooled(self, key: Tensor) -> Tensor:
        if self.pool == 1:
            return key
        means = key.unflatten(-1, (-1, self.pool)).mean(dim=-1, keepdim=True)
        return means.expand(-1, -1, -1, -1, self.pool).flatten(-2)
