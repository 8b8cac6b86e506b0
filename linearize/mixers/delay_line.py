"""The ring of the last w keys and values, and the first m tokens kept as sinks: shared by every mixer with a window.

line = [ring ; new] has w + T entries. Query i of the T new ones attends to entries i+1 .. i+w (itself and the w - 1
before it); entry i has just left its window. So the entries that leave during a call are line[:T], and the ring after
it is line[T:], whatever T is: prefill, pieces and single steps are the same function.

Sinks (StreamingLLM, Xiao et al. 2023): the first m real tokens of a row are attended to for ever through their own
slots, and are hidden from the window, so none counts twice. Slot s is filled when the token of rank s passes.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.program import StateTensor
from linearize.spec import AttentionSpec


class DelayLine(nn.Module):
    """Keys and values of the window and the sinks of one site. `window` >= 1 keys, `sinks` >= 0 tokens."""

    sink_rank: Tensor

    def __init__(self, spec: AttentionSpec, window: int, sinks: int = 0) -> None:
        super().__init__()
        if window < 1 or sinks < 0:
            raise ValueError(f"window must be at least 1 and sinks at least 0, not {window} and {sinks}")
        self.spec, self.window, self.sinks = spec, window, sinks
        self.register_buffer("sink_rank", torch.arange(sinks), persistent=False)

    def state(self) -> tuple[StateTensor, ...]:
        """ring_k [w,G,d], ring_v [w,G,dv], ring_mask [w] (True where a key exists), sink_k [m,G,d], sink_v [m,G,dv]."""
        spec, dtype = self.spec, getattr(torch, self.spec.dtype)
        ring = (
            StateTensor("ring_k", (self.window, spec.kv_heads, spec.head_dim), dtype),
            StateTensor("ring_v", (self.window, spec.kv_heads, spec.value_dim), dtype),
            StateTensor("ring_mask", (self.window,), torch.bool),
        )
        sinks = (
            StateTensor("sink_k", (self.sinks, spec.kv_heads, spec.head_dim), dtype),
            StateTensor("sink_v", (self.sinks, spec.kv_heads, spec.value_dim), dtype),
        )
        return ring + sinks if self.sinks else ring

    def attend(
        self,
        tokens: tuple[Tensor, ...],
        state: tuple[Tensor, ...],
        far: tuple[Tensor | None, ...] = (None, None, None),
        sink_logits: Tensor | None = None,
        held: tuple[Tensor | None, ...] = (None, None),
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor, Tensor]:
        """`tokens` are query [B,T,H,d], key, value, mask and positions as in `push`.

        Softmax over the window and the sinks, with a Hedgehog far field where `far` = (query_map, key_map, omega)
        and `held` = (s, z) are given, all in one operator: (o [B,T,H,dv], the new state, new s, new z)."""
        sinks = state[3:5] if self.sinks else (None, None)
        o, ring_k, ring_v, ring_mask, sink_k, sink_v, s, z = torch.ops.linearize.hybrid_ring.default(
            *tokens, *state[:3], *sinks, *far, sink_logits, *held,
            window=self.window, scale=self.spec.scale,
        )  # fmt: skip
        ring = (ring_k, ring_v, ring_mask)
        return o, (*ring, sink_k, sink_v) if self.sinks else ring, s, z

    def push(self, key: Tensor, value: Tensor, mask: Tensor, positions: Tensor, state: tuple[Tensor, ...]) -> Line:
        """Append key [B,T,G,d], value [B,T,G,dv], mask bool [B,T] with ranks positions int64 [B,T]."""
        ring_k, ring_v, ring_mask = state[:3]
        if not self.sinks:
            return self._line(
                torch.cat([ring_k, key], 1), torch.cat([ring_v, value], 1), torch.cat([ring_mask, mask], 1)
            )
        ranks = positions.unsqueeze(-1)
        arrives = (ranks == self.sink_rank) & mask.unsqueeze(-1)
        writes = arrives.to(key.dtype)
        sink_k = state[3] + torch.einsum("btm,btgd->bmgd", writes, key)
        sink_v = state[4] + torch.einsum("btm,btgd->bmgd", writes, value)
        in_window = mask & (positions >= self.sinks)
        line = self._line(
            torch.cat([ring_k, key], 1), torch.cat([ring_v, value], 1), torch.cat([ring_mask, in_window], 1)
        )
        line.sinks = (sink_k, sink_v, ranks >= self.sink_rank)
        line.state = (*line.state, sink_k, sink_v)
        return line

    def _line(self, key: Tensor, value: Tensor, mask: Tensor) -> Line:
        last = slice(-self.window, None)
        return Line(key, value, mask, (key[:, last], value[:, last], mask[:, last]), self.window)


class Line:
    """[ring ; new] after a push: what the window operator reads, what left, and the ring to keep."""

    def __init__(self, key: Tensor, value: Tensor, mask: Tensor, state: tuple[Tensor, ...], window: int) -> None:
        self.key, self.value, self.mask, self.state = key, value, mask, state
        self.sinks: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None)
        self._window = window

    def leaving_keys(self) -> Tensor:
        """The T keys [B,T,G,d] that leave the window during this call, in order."""
        return self.key[:, : -self._window]
