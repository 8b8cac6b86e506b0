"""Tokens into text as they come: whole characters only, and nothing of a stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

CONTEXT = 6
INCOMPLETE = "�"


class TextStream:
    """`push` takes a token and gives the text that is certain; `flush` gives the rest. `stopped` once a stop string has
    come: what stands before it was given, nothing after it."""

    def __init__(self, tokenizer: Any, prompt: Sequence[int], stops: Sequence[str] = ()) -> None:
        self.tokenizer, self.stops = tokenizer, [stop for stop in stops if stop]
        self.tokens = list(prompt[-CONTEXT:])  # what a token looks like may depend on those before it
        self.start, self.shown = 0, len(self.tokens)
        self.held, self.stopped = "", False

    def push(self, token: int) -> str:
        self.tokens.append(token)
        return self._certain(self._new_text(final=False))

    def flush(self) -> str:
        text = self._certain(self._new_text(final=True))
        rest, self.held = ("" if self.stopped else self.held), ""
        return text + rest

    def _new_text(self, final: bool) -> str:
        """What the tokens since the last whole character say."""
        before = self._decode(self.tokens[self.start : self.shown])
        now = self._decode(self.tokens[self.start :])
        if not final and (now.endswith(INCOMPLETE) or len(now) <= len(before)):
            return ""
        self.start, self.shown = self.shown, len(self.tokens)
        return now[len(before) :]

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def _certain(self, text: str) -> str:
        """The text that cannot become part of a stop string any more."""
        if self.stopped:
            return ""
        self.held += text
        found = [at for stop in self.stops if (at := self.held.find(stop)) >= 0]
        if found:
            self.stopped, sure = True, self.held[: min(found)]
            self.held = ""
            return sure
        keep = max((overlap(self.held, stop) for stop in self.stops), default=0)
        sure, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        return sure


def overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    return next((size for size in range(min(len(text), len(stop)), 0, -1) if text.endswith(stop[:size])), 0)
