"""LoLCATs hybrid (Zhang et al. 2024, eq. 6): window softmax and linear attention under one denominator.

phi(x) = [softmax(x W) ; softmax(-x W)]   (Hedgehog), W_q [H,d,f] by query head, W_k [G,d,f] by kv head
y_i = ( c_h sum_{j in W(i)} e^{s_ij - m_i} v_j + sum_{j left W(i)} phi_q(q_i).phi_k(k_j) v_j ) / ( the same with v = 1 )
m_i = max_{j in W(i)} s_ij,   c_h = e^{omega_h};   q, k rotated

Differences from the reference code, on purpose:
- The window holds exactly `window` keys in prefill and in decode (the reference: 65..128 and 64).
- The state is kept at kv heads, H / G times smaller than after repeating keys and values.
- c_h may exceed 1 (the paper: a sigmoid that starts at 0.1). phi sums to 2, so with c_h <= 1 the far field outweighs
  the window at long distances whatever W is; only the ratio of the two matters.

Starts as window softmax (omega_h = 12 mutes the linear part to about 1e-4) and equals the teacher exactly while
T <= window. `prepare` then finds omega_h and the sharpness of W by search, without gradients.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.mixers.base import Mixer, register_mixer, tokens_first
from linearize.mixers.delay_line import DelayLine
from linearize.program import StateTensor
from linearize.spec import AttentionSpec

MUTED = 12.0
OMEGA_GRID = (-2.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 7.0, MUTED)
SHARPNESS_GRID = (0.5, 1.0, 2.0, 4.0)


@register_mixer
class Lolcats(Mixer):
    """Options: `window`; `features` f (0 means head_dim; the map has 2 f entries); `sinks`.

    State: the delay line, s [G, 2f, dv] = sum phi_k v^T and z [G, 2f] = sum phi_k over the tokens that left it.
    """

    name = "lolcats"
    starts_as = "the teacher's softmax over the last `window` keys (and its first `sinks`)"
    fits = True

    def __init__(self, spec: AttentionSpec, window: int = 64, features: int = 0, sinks: int = 0) -> None:
        super().__init__(spec, window=window, features=features, sinks=sinks)
        self.line = DelayLine(spec, window, sinks)
        self.features = features or spec.head_dim
        self.query_map = nn.Parameter(start_map(spec.heads, spec.head_dim, self.features))
        self.key_map = nn.Parameter(start_map(spec.kv_heads, spec.head_dim, self.features))
        self.omega = nn.Parameter(torch.full((spec.heads,), MUTED))

    def state(self) -> tuple[StateTensor, ...]:
        heads, width = self.spec.kv_heads, 2 * self.features
        far = (StateTensor("s", (heads, width, self.spec.value_dim)), StateTensor("z", (heads, width)))
        return self.line.state() + far

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, positions: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        line = self.line.push(tokens_first(key), tokens_first(value), mask, positions, state[:-2])
        sink_k, sink_v, sink_mask = line.sinks
        o, s, z = torch.ops.linearize.hybrid_chunk.default(
            tokens_first(query), line.key, line.value, line.mask,
            hedgehog(tokens_first(query), self.query_map), hedgehog(line.leaving_keys(), self.key_map),
            torch.exp(self.omega), sink_k, sink_v, sink_mask, None, state[-2], state[-1],
            window=self.line.window, scale=self.spec.scale,
        )  # fmt: skip
        return (tokens_first(o), *line.state, s, z)

    def prepare(self, inputs: list[Tensor], target: Tensor) -> None:
        """Search omega_h on a grid for each query head, and the sharpness of W for each kv head, by output MSE."""
        query_map, key_map = self.query_map.clone(), self.key_map.clone()
        errors, omegas = [], []
        for sharpness in SHARPNESS_GRID:
            self.query_map.copy_(query_map * sharpness)
            self.key_map.copy_(key_map * sharpness)
            by_omega = torch.stack([self._head_errors(omega, inputs, target) for omega in OMEGA_GRID])
            errors.append(by_omega.amin(0))
            omegas.append(torch.tensor(OMEGA_GRID, device=target.device)[by_omega.argmin(0)])
        best_kv = torch.stack(errors).unflatten(1, (self.spec.kv_heads, -1)).sum(-1).argmin(0)
        best = best_kv.repeat_interleave(self.spec.groups)
        sharpness_by_kv = torch.tensor(SHARPNESS_GRID, device=target.device)[best_kv]
        self.key_map.copy_(key_map * sharpness_by_kv[:, None, None])
        self.query_map.copy_(query_map * sharpness_by_kv.repeat_interleave(self.spec.groups)[:, None, None])
        self.omega.copy_(torch.stack(omegas).gather(0, best[None])[0])

    def _head_errors(self, omega: float, inputs: list[Tensor], target: Tensor) -> Tensor:
        """Summed squared error of each head [H] with one omega for all."""
        self.omega.fill_(omega)
        return (self.run(inputs) - target).float().square().sum(dim=(0, 2, 3))


def hedgehog(x: Tensor, weight: Tensor) -> Tensor:
    """[B,T,heads,d], [heads,d,f] -> [B,T,heads,2f]: positive features that sum to 2 (Zhang et al. 2024, Hedgehog)."""
    projected = torch.einsum("bthd,hdf->bthf", x.to(weight.dtype), weight)
    return torch.cat([torch.softmax(projected, dim=-1), torch.softmax(-projected, dim=-1)], dim=-1)


def start_map(heads: int, dim: int, features: int) -> Tensor:
    """[heads, dim, features]: the identity where features = dim, else the first columns of a fixed random rotation
    (repeated when features > dim)."""
    if features == dim:
        return torch.eye(dim).repeat(heads, 1, 1)
    generator = torch.Generator().manual_seed(dim * 10007 + features)
    blocks = [torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0] for _ in range(-(-features // dim))]
    return torch.cat(blocks, dim=1)[:, :features].repeat(heads, 1, 1)
