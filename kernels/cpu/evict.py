"""`evict_chunk` on CPU: its blocks as they are written, but tokens are compared only where a row's block is complete.

In decoding that is once in `window` steps: comparing C + w scores with each other is most of the work of a step.
"""

from __future__ import annotations

from torch import Tensor

from linearize.kernels.registry import Kernel, always, register
from linearize.ops.blocks import Tokens
from linearize.ops.evict import Outputs, Rule, by_blocks, check_evict


def stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    before: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    kept_k: Tensor,
    kept_v: Tensor,
    mass: Tensor | None = None,
    filters: Tensor | None = None,
    *,
    window: int,
    scale: float,
    sinks: int = 0,
    memory: float = 0.0,
) -> Outputs:
    check_evict(q, k, v, mask, before, (ring_k, ring_v), (kept_k, kept_v), mass, filters, window, sinks)
    rule, new = Rule(window, scale, sinks, memory, looks=True), Tokens.of(q, k, v, mask, before, window)
    o, *states = by_blocks(new, (ring_k, ring_v), kept_k, kept_v, mass, filters, rule)
    old = (ring_k, ring_v, kept_k, kept_v, mass)
    fresh = (new if new is not before else new.clone() for new, before in zip(states, old, strict=True))
    return (o, *fresh)  # type: ignore[return-value]


EVICT_STREAM = register(Kernel("cpu.evict_stream", "evict_chunk", "cpu", 10, always, stream))
