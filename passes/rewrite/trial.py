"""One region run alone, to see what it needs of earlier tokens."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import fx

from linearize.passes.rewrite.token_mixing import Region, timed_axes
from linearize.program import Program
from linearize.rewriting.continuation import Continuation, agree
from linearize.rewriting.walk import evaluate

PREFIXES = (1, 2, 3, 5, 9, 15)
CUTS = (3, 7, 12)


class Trial:
    """Runs one region alone on values that a run of the whole program gave."""

    def __init__(self, program: Program, region: Region, reading: Continuation, values: dict[fx.Node, Any]) -> None:
        self.program, self.region, self.reading, self.values = program, region, reading, values
        self.axes = timed_axes(reading, region.target)
        self.entries = {node: values[node] for node in region.entries}
        self.output: torch.Tensor = values[region.target]
        self.length = int(self.output.shape[self._time(region.target)])

    def run(self, entries: dict[fx.Node, torch.Tensor], length: int) -> torch.Tensor:
        given: dict[fx.Node, Any] = {node: self.values[node] for node in self.region.constants if node in self.values}
        given |= entries
        given |= {node: length for node in self.region.sizes}
        offset = [node for node in self.program.placeholders() if node.target == "offset"]
        given |= {node: torch.zeros((), dtype=torch.int64, device=self.program.device) for node in offset}
        return evaluate(self.program.module, [self.region.target], given)[0]  # type: ignore[no-any-return]

    def _time(self, node: fx.Node) -> int:
        axes = timed_axes(self.reading, node)
        assert axes.time is not None
        return axes.time

    def cut(self, start: int, stop: int) -> torch.Tensor:
        """What the region makes of its entries from `start` to `stop`."""
        length = stop - start
        return self.run({n: value.narrow(self._time(n), start, length) for n, value in self.entries.items()}, length)

    def part(self, output: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        return output.narrow(self._time(self.region.target), start, stop - start)

    @cached_property
    def again(self) -> torch.Tensor:
        """The output computed here, which equals the program's but for rounding."""
        return self.cut(0, self.length)

    def looks_ahead(self) -> int | None:
        """The shortest prefix whose outputs change when later tokens come, or None."""
        for length in PREFIXES:
            if length < self.length and not agree(self.cut(0, length), self.part(self.output, 0, length)):
                return length
        return None

    def context(self) -> int | None:
        """K where outputs depend on the last K inputs alone and zeros stand for what came before; None otherwise."""
        if not self.entries:
            return None
        reach = self._reach()
        if reach is None or not 2 <= reach <= self.length // 2:
            return None
        lag = reach - 1
        try:
            holds = all(
                agree(self._tail(self.cut(cut - lag, self.length), cut), self.part(self.output, cut, self.length))
                for cut in CUTS
                if lag <= cut < self.length
            )
            return reach if holds and agree(self._tail(self._after_zeros(lag), 0), self.output) else None
        except (RuntimeError, IndexError, ValueError):
            return None

    def without_past(self) -> frozenset[fx.Node]:
        """Entries whose past no later output needs (queries)."""
        return frozenset(node for node in self.entries if all(self._past_is_idle(node, cut) for cut in CUTS))

    def _past_is_idle(self, node: fx.Node, cut: int) -> bool:
        if cut >= self.length:
            return True
        time, value = self._time(node), self.entries[node].clone()
        value.narrow(time, 0, cut).zero_()
        output = self.run({**self.entries, node: value}, self.length)
        return torch.equal(*(self.part(found, cut, self.length) for found in (output, self.again)))

    def _tail(self, output: torch.Tensor, cut: int) -> torch.Tensor:
        total = output.shape[self._time(self.region.target)]
        return self.part(output, total - (self.length - cut), total)

    def _after_zeros(self, lag: int) -> torch.Tensor:
        padded = {}
        for node, value in self.entries.items():
            zeros = torch.zeros_like(value.narrow(self._time(node), 0, 1))
            padded[node] = torch.cat([zeros] * lag + [value], self._time(node))
        return self.run(padded, self.length + lag)

    def _reach(self) -> int | None:
        """How many outputs the first input moves, counted to the last one."""
        moved = self.run({node: self._disturbed(node, value) for node, value in self.entries.items()}, self.length)
        time = self._time(self.region.target)
        for last in reversed(range(self.length)):
            if not torch.equal(moved.select(time, last), self.again.select(time, last)):
                return last + 1
        return None

    def _disturbed(self, node: fx.Node, value: torch.Tensor) -> torch.Tensor:
        time, value = self._time(node), value.clone()
        first = value.select(time, 0)
        if value.is_floating_point():
            first.mul_(3).add_(value.abs().amax() + 1)
        else:
            first.copy_(value.select(time, 1 if self.length > 1 else 0))
        return value
