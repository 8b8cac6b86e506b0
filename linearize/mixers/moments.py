"""Softmax over a window and, as one more key, over the cloud of all tokens before it, known by its first moments.

           sum_{j in W(i) u S} e^{s_ij} v_j + e^{L_i} u_i      L_i = log n + q.k_bar + mass_h
    y_i = ------------------------------------------------    u_i = v_bar + spread_h Cov(v, q.k)
           sum_{j in W(i) u S} e^{s_ij}     + e^{L_i}          Cov(v, q.k) = sum_j (q.k_j) v_j / n - (q.k_bar) v_bar

s_ij = scale q_i.k_j and q = scale q_i (rotated q, k); W(i) the last `window` tokens, S the row's first `sinks`; n,
k_bar and v_bar are number and means of the tokens that left the window. For jointly Gaussian keys and values the
softmax over them has the logarithmic mass log n + q.k_bar + Var(q.k) / 2 and the output v_bar + Cov(v, q.k): `spread`
1 is exact there, and `mass`, one number a query head, stands for the variance, which is not carried.

State beyond the delay line: sum of [k, 1] [v, 1]^T over the cloud, (d + 1) (dv + 1) numbers a kv head. `gla_chunk`
without gates sums it up and reads it for every query head with [q, 0] and for every kv head with [0, 1].

The mixture is exact through the window operator as it is: q_i has one more entry L_i, with which a further sink key
(0, .., 0, 1) has the logit L_i; values have one more entry, 1 for that key and 0 for the others, in which its weight
comes back.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.mixers.base import Mixer, register_mixer, tokens_first
from linearize.mixers.branches import only_real
from linearize.mixers.delay_line import DelayLine, Line
from linearize.program import StateTensor
from linearize.spec import AttentionSpec

MASS_GRID = (-8.0, -2.0, -1.0, 0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # the first mutes the cloud
DAMPING = 1e-3


@register_mixer
class Moments(Mixer):
    """Options: `window`; `sinks`, first tokens that stay keys of their own and never join the cloud."""

    name = "moments"
    starts_as = (
        "the teacher's softmax over the last `window` keys, the first `sinks`, and one key that stands for all between"
    )
    fits = True

    def __init__(self, spec: AttentionSpec, window: int = 64, sinks: int = 0) -> None:
        super().__init__(spec, window=window, sinks=sinks)
        self.line = DelayLine(spec, window, sinks)
        self.spread = nn.Parameter(torch.ones(spec.heads))
        self.mass = nn.Parameter(torch.zeros(spec.heads))

    def state(self) -> tuple[StateTensor, ...]:
        shape = (self.spec.kv_heads, self.spec.head_dim + 1, self.spec.value_dim + 1)
        return (*self.line.state(), StateTensor("moments", shape))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, positions: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        line = self.line.push(tokens_first(key), tokens_first(value), mask, positions, state[:-1])
        q = tokens_first(query).to(self.mass.dtype)
        logit, output, exists, moments = self._cloud(q, line, state[-1])
        sink_k, sink_v, sink_mask = self._keys_beside_the_window(line, exists)
        o, _, _ = torch.ops.linearize.hybrid_chunk.default(
            torch.cat([q, logit / self.spec.scale], dim=-1), with_column(line.key, 0.0), with_column(line.value, 0.0),
            line.mask, sink_k=sink_k, sink_v=sink_v, sink_mask=sink_mask,
            window=self.line.window, scale=self.spec.scale,
        )  # fmt: skip
        y = o[..., :-1] + o[..., -1:] * output
        return (tokens_first(y.to(query.dtype)), *line.state, moments)

    def _cloud(self, q: Tensor, line: Line, moments: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """L [B,T,H,1], u [B,T,H,dv], whether the cloud has tokens [B,T,1], and the new state."""
        spec, width = self.spec, self.line.window
        writers = with_column(line.leaving_keys().to(q.dtype), 1.0)
        writers = only_real(writers, line.mask[:, :-width])
        values = with_column(line.value[:, :-width].to(q.dtype), 1.0)
        by_query = with_column(q * spec.scale, 0.0).unflatten(2, (spec.kv_heads, spec.groups))
        for_all = torch.zeros_like(by_query[:, :, :, :1, :-1])
        readers = torch.cat([by_query, with_column(for_all, 1.0)], dim=3).flatten(2, 3)
        sums, moments = torch.ops.linearize.gla_chunk.default(readers, writers, values, None, moments)
        sums = sums.unflatten(2, (spec.kv_heads, spec.groups + 1))
        count = sums[:, :, :, -1:, -1:]
        means = sums / count.clamp_min(1.0)
        products, dots, mean = means[..., :-1, :-1], means[..., :-1, -1:], means[..., -1:, :-1]
        output = mean + self._by_head(self.spread) * (products - dots * mean)
        logit = torch.log(count.clamp_min(1.0)) + dots + self._by_head(self.mass)
        return logit.flatten(2, 3), output.flatten(2, 3), count[:, :, 0, 0] > 0.5, moments

    def _keys_beside_the_window(self, line: Line, exists: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The key that stands for the cloud, seen where `exists` [B,T,1], after the sinks."""
        cloud_k = with_column(torch.zeros_like(line.key[:, :1]), 1.0)
        cloud_v = with_column(torch.zeros_like(line.value[:, :1]), 1.0)
        sink_k, sink_v, sink_mask = line.sinks
        if sink_k is None or sink_v is None or sink_mask is None:
            return cloud_k, cloud_v, exists
        keys = torch.cat([with_column(sink_k, 0.0), cloud_k], dim=1)
        values = torch.cat([with_column(sink_v, 0.0), cloud_v], dim=1)
        return keys, values, torch.cat([sink_mask, exists], dim=-1)

    def _by_head(self, parameter: Tensor) -> Tensor:
        """[H] -> [G,H/G,1], to stand against [B,T,G,H/G,dv]."""
        return parameter.unflatten(0, (self.spec.kv_heads, self.spec.groups)).unsqueeze(-1)

    def prepare(self, inputs: list[Tensor], target: Tensor) -> None:
        """mass_h on a grid; spread_h, in which the output is linear, by least squares for each, drawn to 1 where the
        cloud has little weight."""
        found = [self._spread_given(mass, inputs, target) for mass in MASS_GRID]
        errors = torch.stack([error for error, _ in found])
        best = errors.argmin(dim=0)
        self.spread.copy_(torch.stack([spread for _, spread in found]).gather(0, best[None])[0])
        self.mass.copy_(torch.tensor(MASS_GRID, device=best.device)[best])

    def _spread_given(self, mass: float, inputs: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor]:
        """The summed squared error of every head [H], and the spread that reaches it."""
        self.mass.fill_(mass)
        without, at_one = self._run_with_spread(0.0, inputs), self._run_with_spread(1.0, inputs)
        slope, missing = at_one - without, target.double() - at_one
        by_head = (0, 2, 3)
        gain = (slope * missing).sum(by_head)
        power = slope.square().sum(by_head)
        damping = DAMPING * target.double().square().sum(by_head) + torch.finfo(torch.float64).tiny
        step = gain / (power + damping)
        error = (missing - step[:, None, None] * slope).square().sum(by_head)
        return error, 1 + step

    def _run_with_spread(self, spread: float, inputs: list[Tensor]) -> Tensor:
        self.spread.fill_(spread)
        return self.run(inputs).double()


def with_column(x: Tensor, fill: float) -> Tensor:
    """[..,d] -> [..,d+1], the last entry being `fill`."""
    return torch.cat([x, torch.full_like(x[..., :1], fill)], dim=-1)
