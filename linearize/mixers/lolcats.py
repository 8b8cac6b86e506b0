"""LoLCATs hybrid (Zhang et al. 2024, eq. 6): window softmax and linear attention under one denominator.

phi(x) = [softmax(x W) ; softmax(-x W)]   (Hedgehog), W_q [H,d,f] by query head, W_k [G,d,f] by kv head
y_i = ( c_h sum_{j in W(i)} e^{s_ij - m_i} v_j + sum_{j left W(i)} phi_q(q_i).phi_k(k_j) v_j ) / ( the same with v = 1 )
m_i = max_{j in W(i)} s_ij,   c_h = e^{omega_h};   q, k rotated
With `maps` the output is M_h^T y_i + b_h (linear_part.py), M_h the identity at the start; the paper has none.

Differences from the reference code, on purpose:
- The window holds exactly `window` keys in prefill and in decode (the reference: 65..128 and 64).
- The state is kept at kv heads, H / G times smaller than after repeating keys and values.
- c_h may exceed 1 (the paper: a sigmoid that starts at 0.1). phi sums to 2, so with c_h <= 1 the far field outweighs
  the window at long distances whatever W is; only the ratio of the two matters.

Starts as window softmax (omega_h = 12 mutes the linear part to about 1e-4) and equals the teacher exactly while
T <= window. `prepare` then chooses W and omega_h without gradients: clusters of the keys make phi a soft codebook.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from linearize.mixers.base import Mixer, register_mixer, tokens_first
from linearize.mixers.delay_line import DelayLine
from linearize.mixers.linear_part import HeadMaps, LinearPart
from linearize.program import StateTensor
from linearize.spec import AttentionSpec

MUTED = 12.0
OMEGA_RANGE = (-4.0, MUTED, 33)
NEAR_ALONE, FAR_ALONE, MIDDLE = 40.0, -40.0, 3.0
SHARPNESS_GRID = (1.0, 4.0)
ASSIGNMENT_GRID = ((1.0, 1.0), (2.0, 1.0), (4.0, 1.0), (8.0, 1.0), (4.0, 2.0), (8.0, 2.0))  # of keys, of queries


@register_mixer
class Lolcats(Mixer):
    """Options: `window`; `features` f (0 means head_dim; the map has 2 f entries); `sinks`; `maps`.

    State: the delay line, s [G, 2f, dv] = sum phi_k v^T and z [G, 2f] = sum phi_k over the tokens that left it.
    """

    name = "lolcats"
    starts_as = "the teacher's softmax over the last `window` keys (and its first `sinks`)"
    fits = True

    def __init__(
        self, spec: AttentionSpec, window: int = 64, features: int = 0, sinks: int = 0, maps: bool = False
    ) -> None:
        super().__init__(spec, window=window, features=features, sinks=sinks, maps=maps)
        self.line = DelayLine(spec, window, sinks)
        self.features = features or spec.head_dim
        self.query_map = nn.Parameter(start_map(spec.heads, spec.head_dim, self.features))
        self.key_map = nn.Parameter(start_map(spec.kv_heads, spec.head_dim, self.features))
        self.omega = nn.Parameter(torch.full((spec.heads,), MUTED))
        self.maps = HeadMaps(spec.heads, spec.value_dim, [1.0]) if maps else None

    def state(self) -> tuple[StateTensor, ...]:
        heads, width = self.spec.kv_heads, 2 * self.features
        far = (StateTensor("s", (heads, width, self.spec.value_dim)), StateTensor("z", (heads, width)))
        return self.line.state() + far

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, positions: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        tokens = (tokens_first(query), tokens_first(key), tokens_first(value), mask, positions)
        far = (self.query_map, self.key_map, self.omega)
        o, line, s, z = self.line.attend(tokens, state[:-2], far, held=state[-2:])
        if self.maps is not None:
            o = self.maps(o.to(self.omega.dtype)).to(query.dtype)
        return (tokens_first(o), *line, s, z)

    def linear_part(self) -> LinearPart | None:
        return self.maps

    def prepare(self, inputs: list[Tensor], target: Tensor) -> None:
        """Choose by output MSE, without gradients: the maps of each kv head among the identity at several sharpnesses
        and clusters of its keys, and omega_h on a grid for each query head."""
        grid = torch.linspace(*OMEGA_RANGE, dtype=torch.float32, device=target.device)
        candidates, errors, omegas = list(self._candidate_maps(inputs)), [], []
        for query_map, key_map in candidates:
            self.query_map.copy_(query_map)
            self.key_map.copy_(key_map)
            by_omega = self._head_errors(grid, inputs, target)
            errors.append(by_omega.amin(0))
            omegas.append(grid[by_omega.argmin(0)])
        best_kv = torch.stack(errors).unflatten(1, (self.spec.kv_heads, -1)).sum(-1).argmin(0)
        best = best_kv.repeat_interleave(self.spec.groups)
        self.query_map.copy_(torch.stack([candidates[c][0][h] for h, c in enumerate(best.tolist())]))
        self.key_map.copy_(torch.stack([candidates[c][1][g] for g, c in enumerate(best_kv.tolist())]))
        self.omega.copy_(torch.stack(omegas).gather(0, best[None])[0])

    def _candidate_maps(self, inputs: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """(W_q, W_k) to choose from. With W_q = scale x centroids, softmax(q W_q) is the attention over the clusters
        of keys; softmax(k W_k) assigns a key to one of them, the more sharply the larger W_k."""
        for sharpness in SHARPNESS_GRID:
            yield self.query_map * sharpness, self.key_map * sharpness
        keys = inputs[1].float().transpose(0, 1).flatten(1, 2)
        centroids = torch.stack([cluster(head, self.features) for head in keys]).transpose(1, 2)
        by_query = (self.spec.scale * centroids).repeat_interleave(self.spec.groups, dim=0)
        for assignment, sharpness in ASSIGNMENT_GRID:
            yield sharpness * by_query, assignment * self.spec.scale * centroids

    def _head_errors(self, omegas: Tensor, inputs: list[Tensor], target: Tensor) -> Tensor:
        """Summed squared error [number of omegas, H] for each of `omegas` in all heads.

        y = far + w (near - far) with w = c r / (c r + 1), c = e^omega and r what the window weighs against the far
        field: three runs tell near, far and r of every query, and the error is a parabola in w.
        """
        near, far, middle = (self._run_at(omega, inputs) for omega in (NEAR_ALONE, FAR_ALONE, MIDDLE))
        step, missing = near - far, far - target.float()
        power = step.square().sum(-1)
        share = ((middle - far) * step).sum(-1) / power.clamp_min(1e-20)
        share = share.clamp(1e-6, 1 - 1e-6)
        logit = torch.log(share) - torch.log1p(-share) - MIDDLE
        slope, rest = (missing * step).sum(-1), missing.square().sum(-1)
        weights = (torch.sigmoid(logit + omega) for omega in omegas)
        return torch.stack([(rest + w * (2 * slope + w * power)).sum((0, 2)) for w in weights])

    def _run_at(self, omega: float, inputs: list[Tensor]) -> Tensor:
        self.omega.fill_(omega)
        return self.run(inputs).float()


def start_map(heads: int, dim: int, features: int) -> Tensor:
    """[heads, dim, features]: the identity where features = dim, else the first columns of a fixed random rotation
    (repeated when features > dim)."""
    if features == dim:
        return torch.eye(dim).repeat(heads, 1, 1)
    generator = torch.Generator().manual_seed(dim * 10007 + features)
    blocks = [torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0] for _ in range(-(-features // dim))]
    return torch.cat(blocks, dim=1)[:, :features].repeat(heads, 1, 1)


def cluster(points: Tensor, count: int, rounds: int = 12) -> Tensor:
    """Centroids [count, d] of points [N, d] by k-means (Lloyd), from evenly spaced points; empty clusters stay put."""
    start = torch.linspace(0, points.shape[0] - 1, count, device=points.device).long()
    centroids = points[start].clone()
    for _ in range(rounds):
        nearest = torch.cdist(points, centroids).argmin(dim=1)
        counts = torch.zeros(count, device=points.device).index_add_(0, nearest, torch.ones_like(points[:, 0]))
        sums = torch.zeros_like(centroids).index_add_(0, nearest, points)
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp_min(1)[:, None], centroids)
    return centroids
