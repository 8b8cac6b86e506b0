"""Q-Filters (Godey et al. 2025, arXiv 2503.02812): of old tokens, those stay whose keys lie in the queries' direction.

    y_i = softmax over the last w .. 2w - 1 tokens and the C older ones with the largest score f_g.k_j

The queries of a head h, rows of Q_h [N,d] over calibration data, have one main direction: v_h, the first right singular
vector of Q_h (not centred), its sign such that the mean of Q_h v_h is positive. As E_q[q.k] is nearly a positive number
times v_h.k (Theorem 3.3), v_h.k says what attention to a key is to be expected, of queries that are not known yet. A
kv head takes the mean over its query heads, f_g = mean_h v_h (section 3.3). q and k are rotated.

As in the paper no attention weights are needed. Eviction is by blocks of `window` tokens and not token by token, and
the last block or two always stay (see `linearize.ops.evict`). Until it is prepared, f = 0: of equal scores the later
tokens stay.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.mixers.base import register_mixer
from linearize.mixers.evicting import Evicting
from linearize.spec import AttentionSpec


@register_mixer
class QFilters(Evicting):
    """Buffer: filters f [G,d]. State: the ring and the kept tokens, (2w + C) x kv_heads x (d + dv) numbers a row."""

    name = "q_filters"
    starts_as = "the teacher's softmax over the last `keep` + `window` .. `keep` + 2 `window` - 1 tokens"
    fits = True
    may_stay_as_started = False
    filters: Tensor

    def __init__(self, spec: AttentionSpec, window: int = 32, keep: int = 128, sinks: int = 0) -> None:
        super().__init__(spec, window, keep, sinks)
        self.register_buffer("filters", torch.zeros(spec.kv_heads, spec.head_dim))

    def deciding(self, rest: tuple[Tensor, ...]) -> dict[str, Any]:
        return {"filters": self.filters}

    def prepare(self, inputs: list[Tensor], target: Tensor) -> None:
        self.filters.copy_(query_filters(inputs[0], self.spec.kv_heads))


def query_filters(query: Tensor, kv_heads: int) -> Tensor:
    """[B,H,T,d] -> f [G,d] of the module docstring, in float64."""
    rows = query.double().transpose(0, 1).flatten(1, 2)
    _, vectors = torch.linalg.eigh(rows.transpose(1, 2) @ rows)
    main = vectors[..., -1]
    towards = torch.where((rows.mean(1) * main).sum(-1, keepdim=True) < 0, -1.0, 1.0)
    return (main * towards).unflatten(0, (kv_heads, -1)).mean(1)
