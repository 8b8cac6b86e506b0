"""One sequence to be continued: what was asked for, and what came of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from linearize.runtime.generate import Sampling, choose
from linearize.runtime.state import State

Listener = Callable[["int | None", "Exception | None"], None]


@dataclass(eq=False)
class Job:
    """`listener(token, None)` hears every token from the batcher's thread, then `(None, None)`, or an error.

    It ends after `max_tokens`, at a token of `ends` (which is heard too), or when cancelled.
    """

    prompt: list[int]
    max_tokens: int
    listener: Listener
    sampling: Sampling = field(default_factory=Sampling)
    ends: frozenset[int] = frozenset()
    cancelled: bool = False
    state: State | None = None
    read: int = 0
    made: int = 0
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if self.sampling.seed is not None:
            self.generator = torch.Generator().manual_seed(self.sampling.seed)

    def cancel(self) -> None:
        """From any thread; the slot is free before the next step."""
        self.cancelled = True

    @property
    def done(self) -> bool:
        return self.cancelled or self.made >= self.max_tokens

    def pick(self, logits: Tensor) -> int:
        """The next token from logits [1, V], by the request's own random numbers."""
        return int(choose(logits.cpu(), self.sampling, self.generator))

    def hear(self, token: int) -> None:
        """Count a token and pass it on."""
        self.made += 1
        if token in self.ends:
            self.max_tokens = self.made
        self.listener(token, None)

    def finish(self, error: Exception | None = None) -> None:
        self.listener(None, error)
