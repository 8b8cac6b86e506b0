"""Generation from a state: greedy or sampled, batched with left padding, prompts fed in pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from linearize.errors import DataError
from linearize.runtime.tokens import check_tokens

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel
    from linearize.runtime.state import State

PREFILL_PIECE = 2048
ASK_DEVICE_EVERY = 16
LOGITS_OF_A_PIECE = 2**25  # 128 MiB of float32: with a large vocabulary they are what a piece costs


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen, and when to stop.

    do_sample: draw from softmax(logits / temperature) cut to the `top_k` most likely and to the smallest set of
        mass `top_p`; otherwise take the most likely. `seed` makes draws repeatable.
    eos_token_id: a row that produced it is finished and filled with it. `streamer(tokens int64 [B])` sees each token.
    """

    attention_mask: Tensor | None = None
    do_sample: bool = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int | None = None
    eos_token_id: int | None = None
    streamer: Callable[[Tensor], None] | None = None

    def __post_init__(self) -> None:
        if self.do_sample and not self.temperature > 0:
            raise DataError(f"temperature must be above 0, not {self.temperature}; for greedy use do_sample=False")
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise DataError(f"top_p must be in (0, 1] and top_k at least 0, not {self.top_p} and {self.top_k}")


def generate(
    model: LinearizedModel, input_ids: Tensor, max_new_tokens: int, sampling: Sampling, state: State | None = None
) -> Tensor:
    """int64 [B, T] -> int64 [B, T + n], n <= max_new_tokens (fewer when every row ended). No gradients."""
    if max_new_tokens < 0:
        raise DataError(f"max_new_tokens must be at least 0, not {max_new_tokens}")
    check_tokens(input_ids, model.vocab_size)
    columns = []
    for tokens in stream(model, input_ids, max_new_tokens, sampling, state):
        columns.append(tokens)
        if sampling.streamer is not None:
            sampling.streamer(tokens)
    new = torch.stack(columns, dim=1) if columns else input_ids.new_empty(input_ids.shape[0], 0)
    return torch.cat([input_ids.to(model.device), until_all_ended(new, sampling.eos_token_id)], dim=1)


def until_all_ended(new: Tensor, end: int | None) -> Tensor:
    """The columns of int64 [B, n] up to the one in which the last row ended."""
    if end is None or new.shape[1] == 0:
        return new
    open_rows = (new == end).cumsum(1) == 0  # before the end, row by row
    return new[:, : int(open_rows.any(0).sum()) + 1]


def stream(
    model: LinearizedModel, input_ids: Tensor, max_new_tokens: int, sampling: Sampling, state: State | None = None
) -> Iterator[Tensor]:
    """The next tokens int64 [B], one step at a time.

    Steps are queued without waiting for the device; whether all rows have ended is asked of it every
    `ASK_DEVICE_EVERY` tokens only, so up to so many columns of end tokens may follow.
    """
    if max_new_tokens == 0:
        return
    generator = None
    if sampling.seed is not None:
        generator = torch.Generator(device=model.device).manual_seed(sampling.seed)
    every = 1 if model.device.type == "cpu" else ASK_DEVICE_EVERY
    with torch.no_grad():
        logits, state = prefill(model, input_ids, sampling.attention_mask, state=state)
        finished = torch.zeros(input_ids.shape[0], dtype=torch.bool, device=model.device)
        for count in range(1, max_new_tokens + 1):
            tokens = choose(logits, sampling, generator)
            if sampling.eos_token_id is not None:
                tokens = torch.where(finished, sampling.eos_token_id, tokens)
                finished = finished | (tokens == sampling.eos_token_id)
            yield tokens
            if count == max_new_tokens or (count % every == 0 and bool(finished.all())):
                return
            logits, state = model.decode(tokens, state)


def prompt_pieces(length: int, batch: int, vocab_size: int | None, piece: int | None = None) -> list[slice]:
    """A prompt cut so that a piece's memory is bounded whatever the prompt: by tokens, and by the logits of a piece
    where those of all its tokens are computed (`vocab_size` is then given)."""
    if piece is None:
        rows = LOGITS_OF_A_PIECE // (batch * (vocab_size or 1))
        piece = max(min(PREFILL_PIECE, rows), 1)
    return [slice(start, min(start + piece, length)) for start in range(0, length, piece)]


def prefill(
    model: LinearizedModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    piece: int | None = None,
    state: State | None = None,
) -> tuple[Tensor, State]:
    """Feed a prompt int64 [B, T] in pieces, behind what `state` has seen; (logits [B, V] after its last token, state).

    `attention_mask` is [B, T], or [B, seen + T].
    """
    batch, length = input_ids.shape
    if attention_mask is not None:
        attention_mask = attention_mask[:, -length:]
    logits: Tensor | None = None
    for part in prompt_pieces(length, batch, model.prompt_graph.vocab_size, piece):
        mask = attention_mask[:, part] if attention_mask is not None else None
        logits, state = model.step(input_ids[:, part], state, mask, logits_to_keep=1)
    if logits is None or state is None:
        raise DataError("the prompt is empty; at least one token is needed")
    return logits[:, -1], state


def choose(logits: Tensor, sampling: Sampling, generator: torch.Generator | None) -> Tensor:
    """Next tokens int64 [B] from logits [B, V]."""
    if not sampling.do_sample:
        return logits.argmax(dim=-1)
    scores = logits.float() / sampling.temperature
    if sampling.top_k:
        lowest = scores.topk(min(sampling.top_k, scores.shape[-1]), dim=-1).values[:, -1:]
        scores = scores.masked_fill(scores < lowest, float("-inf"))
    probabilities = torch.softmax(scores, dim=-1)
    if sampling.top_p < 1.0:
        ordered, order = probabilities.sort(dim=-1, descending=True)
        beyond = ordered.cumsum(dim=-1) - ordered >= sampling.top_p  # the token that crosses top_p is kept
        probabilities = torch.zeros_like(probabilities).scatter(-1, order, ordered.masked_fill(beyond, 0.0))
    return torch.multinomial(probabilities, 1, generator=generator).squeeze(-1)
