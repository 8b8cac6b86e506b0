"""StreamingLLM (Xiao et al. 2023, arXiv 2309.17453): a window and sinks, at the positions that they have in the cache.

    y_i = softmax over the last w tokens and the first m,    m = `sinks`, w = `window`
    s_ij = scale q_i.k_j                                     j in the window
    s_ij = scale (R_p(i) q0_i).k_j,  p(i) = min(i, m + w - 1)     j a sink; q0 is q before its rotation

"The positions within the cache rather than those in the text" (section 3.2): tokens of the window are as far from the
query as in the text, but the sinks stand right before the window, so the query meets them as if it stood at p(i), at a
distance that models have seen however long the text gets. The mixer `window` leaves them at their distance in the text.

The rotation at m + w - 1 is not known to a graph but read off it once: when the token of that rank passes, q = c q0 in
every rotary pair taken as a complex number, so c = sum_h conj(q0_h) q_h / sum_h |q0_h|^2 over the heads. From then on c
is state. Without a rotation it is `window`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.mixers.base import Mixer, register_mixer, tokens_first
from linearize.mixers.delay_line import DelayLine
from linearize.mixers.mla_basis import pair_dims
from linearize.program import StateTensor
from linearize.spec import AttentionSpec, Site


@register_mixer
class Streaming(Mixer):
    """State: the delay line, (window + sinks) x kv_heads x (head_dim + value_dim) numbers a row, and turn [2,d/2]: the
    real and imaginary parts of c."""

    name = "streaming"
    needs = ("query_unrotated",)
    starts_as = "the teacher's softmax over the last `window` keys and the first `sinks`, those moved up to the window"
    first: Tensor
    second: Tensor

    def __init__(self, spec: AttentionSpec, window: int = 64, sinks: int = 4) -> None:
        super().__init__(spec, window=window, sinks=sinks)
        if sinks < 1:
            raise ValueError(f"sinks must be at least 1, not {sinks}: without them it is the mixer window")
        self.line = DelayLine(spec, window, sinks)
        self.turns_at = window + sinks - 1
        pairs = torch.tensor(pair_dims(spec) if spec.rope else [], dtype=torch.int64).reshape(-1, 2)
        self.register_buffer("first", pairs[:, 0].clone(), persistent=False)
        self.register_buffer("second", pairs[:, 1].clone(), persistent=False)
        self.pairs = len(pairs)
        self.wide = torch.float64 if self.dtype == torch.float64 else torch.float32

    @classmethod
    def refusal(cls, site: Site) -> str | None:
        rope = site.attention.rope
        if rope is not None and rope.pairs == "other":
            return f"{cls.name} does not know which dims {rope} rotates together"
        return super().refusal(site)

    def state(self) -> tuple[StateTensor, ...]:
        return (*self.line.state(), StateTensor("turn", (2, self.pairs), self.wide))

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, plain: Tensor, mask: Tensor, positions: Tensor, *state: Tensor
    ) -> tuple[Tensor, ...]:
        q, k, q0 = tokens_first(query), tokens_first(key), tokens_first(plain)
        *line, turn = state
        moved = q
        if self.pairs:
            turn = turn + self._turn(q, q0, mask & (positions == self.turns_at))
            late = (positions > self.turns_at).unsqueeze(-1).unsqueeze(-1)
            moved = torch.where(late, self._turned(q, q0, turn), q)
        sink = (positions < self.line.sinks).unsqueeze(-1).unsqueeze(-1)
        none = torch.zeros_like(k)
        keys = torch.where(sink, torch.cat([none, k], -1), torch.cat([k, none], -1))
        tokens = (torch.cat([q, moved], -1), keys, tokens_first(value), mask, positions)
        ring_k, ring_v, ring_mask, sink_k, sink_v = line
        held = (_wide(ring_k, behind=True), ring_v, ring_mask, _wide(sink_k, behind=False), sink_v)
        o, (ring_k, ring_v, ring_mask, sink_k, sink_v), _, _ = self.line.attend(tokens, held)
        d = self.spec.head_dim
        return (tokens_first(o), ring_k[..., :d], ring_v, ring_mask, sink_k[..., d:], sink_v, turn)

    def _turn(self, q: Tensor, q0: Tensor, arrives: Tensor) -> Tensor:
        """[B,2,pairs]: c of the module docstring where a row's token `arrives` [B,T], 0 otherwise. q, q0 [B,T,H,d]."""
        here = arrives.unsqueeze(-1).unsqueeze(-1)
        x, y, a, b = (
            torch.where(here, part.to(self.wide), 0.0)
            for whole in (q, q0)
            for part in (whole.index_select(3, self.first), whole.index_select(3, self.second))
        )
        real, imaginary = ((a * x + b * y).sum((1, 2)), (a * y - b * x).sum((1, 2)))
        size = (a * a + b * b).sum((1, 2)).clamp_min(1e-30)
        return torch.stack([real / size, imaginary / size], 1)

    def _turned(self, q: Tensor, q0: Tensor, turn: Tensor) -> Tensor:
        """c q0 in every rotary pair, q in the dims that are never rotated. [B,T,H,d]."""
        a, b = q0.index_select(3, self.first), q0.index_select(3, self.second)
        real, imaginary = (turn[:, part, None, None].to(q.dtype) for part in (0, 1))
        pairs = torch.cat([a * real - b * imaginary, a * imaginary + b * real], -1)
        return torch.index_copy(q, 3, torch.cat([self.first, self.second]), pairs)


def _wide(x: Tensor, behind: bool) -> Tensor:
    """[..,d] -> [..,2d], with zeros behind or in front."""
    return torch.cat([x, torch.zeros_like(x)] if behind else [torch.zeros_like(x), x], -1)
