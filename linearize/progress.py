"""Progress bars on stderr, or nothing."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars

T = TypeVar("T")


class Progress:
    """`track` wraps a sequence; nested calls of one description show the innermost. `note` shows a figure beside it."""

    def __init__(self, enabled: bool) -> None:
        console = Console(stderr=True)
        self._bars = Bars(
            TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console, transient=True, disable=not (enabled and console.is_terminal),
        )  # fmt: skip
        self._depth = 0
        self._task: TaskID | None = None

    def track(self, items: Iterable[T], description: str, total: int | None = None) -> Iterator[T]:
        if total is None and isinstance(items, Sequence | range):
            total = len(items)
        if self._depth == 0:
            self._bars.start()
        self._depth += 1
        task = self._bars.add_task(description, total=total, note="")
        self._task = task
        try:
            for item in items:
                yield item
                self._bars.advance(task)
        finally:
            self._bars.remove_task(task)
            self._depth -= 1
            if self._depth == 0:
                self._bars.stop()

    def note(self, text: str) -> None:
        if self._task is not None and self._depth:
            self._bars.update(self._task, note=text)
