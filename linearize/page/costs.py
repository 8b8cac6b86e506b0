"""What a sequence carries and what a decode step reads, by context: the numbers behind the page's plots.

A decode step on one sequence reads every weight once and its cache or state once, so where memory is the limit its time
is proportional to these bytes. The prediction is that ratio; it knows nothing of how well kernels are written.
"""

from __future__ import annotations

import torch

from linearize.program import Program, StateTensor
from linearize.spec import Site

CONTEXTS = tuple(2**power for power in range(9, 18))


def cache_bytes(program: Program, context: int) -> int:
    """Keys and values of one sequence in the source's cache, of the attentions that were matched."""
    return sum(_site_cache(site, context) for site in program.matched)


def _site_cache(site: Site, context: int) -> int:
    spec = site.attention
    length = min(context, spec.mask.size) if spec.mask.kind in ("sliding", "chunked") else context
    width = getattr(torch, spec.dtype).itemsize
    return spec.kv_heads * (spec.head_dim + spec.value_dim) * length * int(width)


def state_bytes(program: Program, context: int) -> int:
    """The state of one sequence of a rewritten program."""
    specs: list[StateTensor] = [node.meta["state"] for node in program.placeholders() if "state" in node.meta]
    return sum(spec.bytes(1, context) for spec in specs)


def weight_bytes(program: Program) -> int:
    """Bytes of the parameters that a step reads; a shared one counts once."""
    return sum(parameter.numel() * parameter.element_size() for parameter in program.module.parameters())


def predicted_speedup(before: Program, after: Program, context: int) -> float:
    """Tokens per second of one sequence relative to the source with its cache, where memory is the limit."""
    source = weight_bytes(before) + cache_bytes(before, context)
    return source / (weight_bytes(after) + state_bytes(after, context))
