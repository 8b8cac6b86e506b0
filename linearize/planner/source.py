"""The operators of a source model's own decoding step, with its key-value cache.

Two real steps are counted, with few tokens in the cache; what an operator moves and computes is linear in their number,
so that any context follows without a cache of its size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from linearize.errors import DataError
from linearize.planner.counting import MODULE, Call, Counting
from linearize.runtime.speed import filled_cache

CONTEXTS = (64, 128)


@torch.no_grad()
def source_calls(source: nn.Module, context: int) -> list[Call]:
    """Of one token with `context` before it.

    Raises:
        DataError: the model has no key-value cache as transformers' models have.
    """
    if not hasattr(source, "config") or not hasattr(source, "generate"):
        raise DataError(f"{type(source).__name__} is no transformers model, so its own decoding cannot be counted")
    few, more = (_counted(source, length) for length in CONTEXTS)
    if [call.name for call in few] != [call.name for call in more]:
        raise DataError(f"{type(source).__name__} decodes differently by context; its own speed is not predicted")
    return [_at(one, two, context) for one, two in zip(few, more, strict=True)]


def _counted(source: nn.Module, context: int) -> list[Call]:
    tokens = torch.ones(1, context, dtype=torch.int64, device=next(source.parameters()).device)
    cache = filled_cache(source, tokens, context)
    with Counting() as counting:
        hook = register_module_forward_pre_hook(lambda *_: counting.calls.append(Call(MODULE, 0, 0)))
        try:
            source(tokens[:, -1:], past_key_values=cache, use_cache=True)
        finally:
            hook.remove()
    return counting.calls


def _at(one: Call, two: Call, context: int) -> Call:
    low, high = CONTEXTS
    part = (context - low) / (high - low)

    def line(first: int, second: int) -> Any:
        return max(round(first + (second - first) * part), 0)

    return Call(one.name, line(one.bytes, two.bytes), line(one.operations, two.operations))
