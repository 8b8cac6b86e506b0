"""Tokens per second and bytes of state of a compiled model against its source with a key-value cache."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel

FILLED = 512
PIECE = 256


@dataclass(frozen=True)
class Speed:
    """Decoding one token at a time with `context` tokens behind it: median over the steps, and what is carried."""

    context: int
    tokens_per_second: float
    state_bytes: int


@torch.no_grad()
def decode_speeds(source: nn.Module, compiled: LinearizedModel, context: int, steps: int) -> tuple[Speed, Speed]:
    """(source, compiled) at one context length, their steps taken in turn, so that a busy machine slows both alike.

    The compiled model reads all `context` tokens. The source's cache is real: 512 tokens are read, and its tensors are
    then repeated to the length, since a step's cost depends on their shapes alone.
    """
    tokens = torch.arange(context).unsqueeze(0) % (compiled.vocab_size or 2)
    cache = filled_cache(source, tokens, context)
    state: Any = None
    for piece in tokens.split(PIECE, dim=1):
        _, state = compiled.step(piece, state)
    last = tokens[:, -1:]

    def source_step() -> None:
        source(last, past_key_values=cache, use_cache=True)

    def compiled_step() -> None:
        compiled.step(last, state)

    for warm in (source_step, compiled_step):
        warm()
    size = cache_bytes(cache)
    seconds = [(timed(source_step), timed(compiled_step)) for _ in range(steps)]
    rates = [1 / median(column) for column in zip(*seconds, strict=True)]
    return Speed(context, rates[0], size), Speed(context, rates[1], state.nbytes)


def filled_cache(source: nn.Module, tokens: Tensor, context: int) -> Any:
    """A transformers cache that holds `context` tokens."""
    cache = source(tokens[:, :FILLED], use_cache=True).past_key_values
    for layer in cache.layers:
        times = -(-context // layer.keys.shape[2])
        layer.keys = layer.keys.repeat(1, 1, times, 1)[:, :, :context].contiguous()
        layer.values = layer.values.repeat(1, 1, times, 1)[:, :, :context].contiguous()
    return cache


def cache_bytes(cache: Any) -> int:
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def timed(step: Callable[[], None]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
