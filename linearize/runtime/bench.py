"""A compiled model beside its source, by context and batch, in one process: steps are taken in turn, so that what else
the machine does slows both alike. Read the ratios."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import DataError
from linearize.runtime.live_memory import peak_bytes
from linearize.runtime.model import LinearizedModel
from linearize.runtime.speed import cache_bytes, filled_cache


@dataclass(frozen=True)
class Measured:
    """One context and batch; each pair is (source, compiled).

    `tokens_per_second` counts all rows; `first_token` is seconds from a prompt of `context` tokens to its next one,
    None where it was not measured; `carried` is the bytes of cache or state, `peak` the most bytes of tensors alive in
    a step, carried ones included.
    """

    context: int
    batch: int
    tokens_per_second: tuple[float, float]
    carried: tuple[int, int]
    peak: tuple[int, int]
    first_token: tuple[float, float] | None = None

    @property
    def speedup(self) -> float:
        return self.tokens_per_second[1] / self.tokens_per_second[0]


@torch.no_grad()
def measure(
    source: nn.Module, compiled: LinearizedModel, contexts: Sequence[int], batches: Sequence[int], steps: int = 20,
    first_token: bool = True, filled: Callable[..., Any] = filled_cache,
) -> Iterator[Measured]:  # fmt: skip
    """Every context with every batch. The source's cache holds the keys and values of 512 tokens, repeated to the
    length: a step's cost depends on their shapes alone. The time to the first token is measured at batch 1.

    Raises:
        DataError: the source has no key-value cache, or a context is longer than one of the models can take.
    """
    check(source, compiled, contexts)
    for context in contexts:
        tokens = torch.arange(context, device=compiled.device).unsqueeze(0) % (compiled.vocab_size or 2)
        waited = first_tokens(source, compiled, tokens) if first_token else None
        _, state = compiled.prefill(tokens[:, -min(context, 2048) :] if not compiled.engine.grows else tokens)
        for batch in batches:
            last = tokens[:, -1:].expand(batch, 1).contiguous()
            cache = filled(source, tokens.expand(batch, -1), context)
            yield _decode(source, compiled, last, cache, state.repeat(batch), steps, waited if batch == 1 else None)
            del cache


def _decode(source: nn.Module, compiled: LinearizedModel, last: Tensor, cache: Any, state: Any, steps: int,
            waited: tuple[float, float] | None) -> Measured:  # fmt: skip
    context, carried = cache.get_seq_length(), (cache_bytes(cache), state.nbytes)
    held = [cache]

    def source_step() -> None:
        held[0] = source(last, past_key_values=held[0], use_cache=True).past_key_values

    def compiled_step() -> None:
        compiled.decode(last[:, 0], state)

    for warm in (source_step, compiled_step, source_step, compiled_step):
        warm()
    seconds = [(timed(source_step, last.device), timed(compiled_step, last.device)) for _ in range(steps)]
    rates = [last.shape[0] / median(column) for column in zip(*seconds, strict=True)]
    peaks = [peak_bytes(step, last.device) for step in (source_step, compiled_step)]
    peak = (carried[0] + peaks[0], carried[1] + peaks[1])
    return Measured(context, last.shape[0], (rates[0], rates[1]), carried, peak, waited)


def first_tokens(source: Any, compiled: LinearizedModel, prompt: Tensor) -> tuple[float, float]:
    """Seconds of (source, compiled) from a prompt to its next token."""
    def of_source() -> None:
        source(prompt, use_cache=True, logits_to_keep=1).logits.argmax(-1)

    def of_compiled() -> None:
        compiled.prefill(prompt)[0].argmax(-1)

    compiled.prefill(prompt[:, :2])  # makes the graph of a prompt, once a model
    return timed(of_source, prompt.device), timed(of_compiled, prompt.device)


def timed(function: Callable[[], None], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def check(source: Any, compiled: LinearizedModel, contexts: Sequence[int]) -> None:
    """Raises DataError: see `measure`."""
    if not hasattr(source, "generate") or not hasattr(source, "config"):
        raise DataError(f"{type(source).__name__} is no transformers model, so it has no key-value cache to time")
    limit = compiled.program.max_positions
    if limit is not None and max(contexts) >= limit:
        raise DataError(f"the model has {limit} learned positions; bench contexts below that")
    if min(contexts) < 1:
        raise DataError(f"a context has at least one token, not {min(contexts)}")
