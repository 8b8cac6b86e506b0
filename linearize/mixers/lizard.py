"""Lizard (Nguyen et al. 2025): gated linear attention on un-rotated q, k, plus a window softmax with sink logits.

Gamma_i = sigmoid(W_g x_i + b_g)                    W_g [D,G]: a scalar gate by token and kv head, from the hidden state
phi(x) = [exp(x W) ; exp(-x W)]                      W_q [H,d,f], W_k [G,d,f], x un-rotated
S_i = Gamma_i S_{i-1} + phi(k_i) v_i^T,  z_i = Gamma_i z_{i-1} + phi(k_i),  Yg_i = phi(q_i)^T S_i / phi(q_i)^T z_i
Ya_i = sum_{j in W(i)} e^{s_ij} v_j / ( sum_j e^{t_j} + sum_{j in W(i)} e^{s_ij} )        m sink logits t_j by head
y = beta_h Yg + alpha_h Ya             with `maps`: y = B_h^T Yg + A_h^T Ya + c_h (linear_part.py)

The paper has y = Yg + alpha Ya; beta starts at 0 and alpha at 1, so before fitting the mixer is the window softmax with
sink logits. Gates are kept by kv head, so that the state is too (the paper: by query head). phi(q) is divided by its
largest entry, which cancels in Yg; phi(k) cannot be, so its exponent is clamped at +-EXPONENT_LIMIT.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.mixers.base import Mixer, register_mixer, tokens_first
from linearize.mixers.branches import solve_weights
from linearize.mixers.delay_line import DelayLine
from linearize.mixers.linear_part import HeadMaps, LinearPart, Weights
from linearize.mixers.lolcats import start_map
from linearize.program import StateTensor
from linearize.spec import AttentionSpec

EXPONENT_LIMIT = 12.0
START_GATE = 5.0  # sigmoid(5) = 0.993: half a token's weight is left after about 100 tokens
START_SINK = -6.0


@register_mixer
class Lizard(Mixer):
    """Options: `window`; `sink_logits` m; `features` f (0 means head_dim; the map has 2 f entries); `maps`.

    State: the delay line and s [G, 2f, dv + 1], the last column being z.
    """

    name = "lizard"
    needs = ("query_unrotated", "key_unrotated", "hidden")
    starts_as = "the teacher's softmax over the last `window` keys, with `sink_logits` logits of -6 in its denominator"
    fits = True

    def __init__(
        self, spec: AttentionSpec, window: int = 128, sink_logits: int = 4, features: int = 0, maps: bool = False
    ) -> None:
        super().__init__(spec, window=window, sink_logits=sink_logits, features=features, maps=maps)
        if sink_logits < 1:
            raise ValueError(f"sink_logits must be at least 1, not {sink_logits}")
        self.line = DelayLine(spec, window)
        self.features = features or spec.head_dim
        scale = spec.head_dim**-0.25
        self.query_map = nn.Parameter(start_map(spec.heads, spec.head_dim, self.features) * scale)
        self.key_map = nn.Parameter(start_map(spec.kv_heads, spec.head_dim, self.features) * scale)
        self.gate = nn.Linear(spec.hidden_dim, spec.kv_heads)
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.gate.bias, START_GATE)
        self.sink_logits = nn.Parameter(torch.full((spec.heads, sink_logits), START_SINK))
        self.maps = HeadMaps(spec.heads, spec.value_dim, [1.0, 0.0]) if maps else None
        if self.maps is None:
            self.alpha = nn.Parameter(torch.ones(spec.heads))
            self.beta = nn.Parameter(torch.zeros(spec.heads))

    def state(self) -> tuple[StateTensor, ...]:
        far = StateTensor("s", (self.spec.kv_heads, 2 * self.features, self.spec.value_dim + 1))
        return (*self.line.state(), far)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor,
        query_unrotated: Tensor, key_unrotated: Tensor, hidden: Tensor,
        mask: Tensor, positions: Tensor, *state: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        far, s = self._far(query_unrotated, key_unrotated, value, hidden, mask, state[-1])
        near, ring = self._near(query, key, value, mask, positions, state[:-1])
        near = near.to(far.dtype)
        if self.maps is not None:
            y = self.maps(near, far)
        else:
            y = self.beta.unsqueeze(-1) * far + self.alpha.unsqueeze(-1) * near
        return (tokens_first(y.to(query.dtype)), *ring, s)

    def _far(
        self, query: Tensor, key: Tensor, value: Tensor, hidden: Tensor, mask: Tensor, s: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Yg [B,T,H,dv] and the new state."""
        real = mask.unsqueeze(-1)
        log_gate = -torch.nn.functional.softplus(-self.gate(hidden.to(self.gate.weight.dtype)))
        log_gate = torch.where(real, log_gate, torch.zeros_like(log_gate))
        readers = exponential_query(tokens_first(query), self.query_map)
        writers = exponential_key(tokens_first(key), self.key_map) * real.unsqueeze(-1)
        values = tokens_first(value).to(self.gate.weight.dtype)
        values = torch.cat([values, torch.ones_like(values[..., :1])], dim=-1)
        sums, s = torch.ops.linearize.gla_chunk.default(readers, writers, values, log_gate, s)
        return sums[..., :-1] / sums[..., -1:].clamp_min(1e-20), s

    def _near(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, positions: Tensor, ring: tuple[Tensor, ...]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Ya [B,T,H,dv] and the new ring."""
        tokens = (tokens_first(query), tokens_first(key), tokens_first(value), mask, positions)
        near, line, _, _ = self.line.attend(tokens, ring, sink_logits=self.sink_logits)
        return near, line

    def prepare(self, inputs: list[Tensor], target: Tensor) -> None:
        """alpha_h and beta_h by least squares, given the two branches."""
        solve_weights(self, inputs, target)

    def linear_part(self) -> LinearPart:
        return self.maps if self.maps is not None else Weights([self.alpha, self.beta], self.spec.value_dim)


def exponential_query(x: Tensor, weight: Tensor) -> Tensor:
    """[B,T,heads,d], [heads,d,f] -> [B,T,heads,2f]: exp(+-xW) over its largest entry, which cancels in Yg."""
    exponent = _exponent(x, weight)
    return torch.exp(exponent - exponent.amax(dim=-1, keepdim=True))


def exponential_key(x: Tensor, weight: Tensor) -> Tensor:
    """[B,T,heads,d], [heads,d,f] -> [B,T,heads,2f]: exp(+-xW), exponents clamped."""
    return torch.exp(_exponent(x, weight))


def _exponent(x: Tensor, weight: Tensor) -> Tensor:
    projected = torch.einsum("bthd,hdf->bthf", x.to(weight.dtype), weight)
    return torch.cat([projected, -projected], dim=-1).clamp(-EXPONENT_LIMIT, EXPONENT_LIMIT)
