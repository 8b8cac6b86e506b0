"""Nodes of a graph computed again over a stretch of time that begins before the new tokens."""

from __future__ import annotations

import math

import torch
from torch import fx

from linearize.passes.rewrite.token_mixing import Region
from linearize.program import StateTensor
from linearize.rewriting.continuation import Axes, Continuation
from linearize.rewriting.editor import Editor
from linearize.rewriting.walk import MAX_INDEX

aten = torch.ops.aten


class Threads:
    """Adds state to a graph: an input for what a call is given, an output for what it leaves behind."""

    def __init__(self, editor: Editor, reading: Continuation) -> None:
        self.editor, self.reading = editor, reading
        self.states: list[StateTensor] = []
        self._leaving: list[fx.Node] = []
        self._last_input = [node for node in editor.graph.nodes if node.op == "placeholder"][-1]

    def add(self, axes: Axes, length: int, grows: bool, dtype: torch.dtype) -> fx.Node:
        """A state of `length` tokens with the layout of `axes`; the batch, if any, is dim 0."""
        assert axes.time is not None
        shape = [length if dim == axes.time else size for dim, size in enumerate(axes.shape)]
        batched = axes.batch is not None
        name = f"carried_{len(self.states)}"
        time = axes.time - 1 if batched else axes.time
        state = StateTensor(name, tuple(shape[1:] if batched else shape), dtype, time if grows else None, batched)
        self.states.append(state)
        self._last_input = self.editor.add_input(name, self._last_input, state)
        return self._last_input

    def leave(self, node: fx.Node) -> None:
        """`node` is the new value of the state that was added last."""
        self._leaving.append(node)

    def running_sum(self, target: fx.Node) -> fx.Node:
        """cumsum(x) + the last sum of the call before."""
        axes = self.reading.axes[target]
        before = self.add(axes, 1, grows=False, dtype=axes.dtype)
        here = self.editor.copy(target, {})
        total = self.editor.call(aten.add.Tensor, here, before, origin=target)
        self.leave(self.editor.call(aten.slice.Tensor, total, axes.time, -1, MAX_INDEX))
        return total

    def stands_for(self, old: fx.Node, new: fx.Node) -> None:
        """Every later node reads `new`."""
        self.reading.register(new, like=old)
        self.editor.replace(old, new)

    def numbers(self, since: int) -> int:
        """Numbers that the states from the `since`th on hold for a row: in all, or for a token where they grow."""
        return sum(
            math.prod(size for dim, size in enumerate(state.shape) if dim != state.grows)
            for state in self.states[since:]
        )

    def finish(self) -> None:
        output = next(node for node in self.editor.graph.nodes if node.op == "output")
        (results,) = output.args
        output.args = ((*results, *self._leaving),)  # type: ignore[misc]


class Stretch:
    """The new tokens behind `lag` earlier ones, or behind all earlier ones (None)."""

    def __init__(self, threads: Threads, lag: int | None) -> None:
        self.threads, self.editor, self.lag = threads, threads.editor, lag
        self.size: fx.Node | None = None
        self._earlier: fx.Node | int | None = lag
        self._lifted: dict[fx.Node, fx.Node] = {}

    def enter(self, node: fx.Node) -> fx.Node:
        """`node` over the whole stretch, its past from a state."""
        if node in self._lifted:
            return self._lifted[node]
        axes = self.threads.reading.axes[node]
        first, turned = _batch_first(axes)
        here = self._swap(node, axes) if turned else node
        before = self.threads.add(first, self.lag or 0, self.lag is None, axes.dtype)
        joined = self.editor.call(aten.cat.default, [before, here], first.time)
        lag = self.lag
        self.threads.leave(joined if lag is None else self._tail(joined, first, lag))
        if self.size is None:
            self.size = self.editor.call(aten.sym_size.int, joined, first.time)
            if lag is None:
                self._earlier = self.editor.call(aten.sym_size.int, before, first.time)
        self._lifted[node] = self._swap(joined, axes) if turned else joined
        return self._lifted[node]

    def enter_idle(self, node: fx.Node) -> None:
        """`node` with zeros for its past, which nothing reads."""
        if node in self._lifted:
            return
        axes = self.threads.reading.axes[node]
        assert axes.time is not None
        padding = [0, 0] * (len(axes.shape) - 1 - axes.time) + [self._earlier, 0]
        self._lifted[node] = self.editor.call(aten.constant_pad_nd.default, node, padding, 0)

    def _tail(self, joined: fx.Node, axes: Axes, lag: int) -> fx.Node:
        return self.editor.call(aten.slice.Tensor, joined, axes.time, -lag, MAX_INDEX)

    def _swap(self, node: fx.Node, axes: Axes) -> fx.Node:
        return self.editor.call(aten.transpose.int, node, 0, axes.batch)

    def lift(self, region: Region) -> fx.Node:
        """The region's target over the whole stretch, whose entries are in it."""
        assert self.size is not None
        self._lifted |= {node: self.size for node in region.sizes}
        for node in sorted(region.inner):
            if node not in self._lifted:
                self._lifted[node] = self._again(node)
        return self._lifted[region.target]

    def _again(self, node: fx.Node) -> fx.Node:
        if any(_is_offset(arg) for arg in node.all_input_nodes):
            return self._lifted[node.args[0]]  # type: ignore[index] # positions of the stretch count from its start
        return self.editor.copy(node, self._lifted)

    def last(self, target: fx.Node, lifted: fx.Node, partly: bool) -> fx.Node:
        """The new tokens' part of `lifted`, which is `partly` right before them."""
        time = self.threads.reading.axes[target].time
        new = self.editor.call(aten.slice.Tensor, lifted, time, self._earlier, MAX_INDEX, origin=target)
        if not partly:
            self._lifted[new] = lifted
        return new


def _is_offset(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.target == "offset"


def _batch_first(axes: Axes) -> tuple[Axes, bool]:
    """The axes with the batch in front, and whether that moved it."""
    batch = axes.batch
    if batch in (None, 0):
        return axes, False
    assert batch is not None
    shape = list(axes.shape)
    shape[0], shape[batch] = shape[batch], shape[0]
    time = batch if axes.time == 0 else axes.time
    return Axes(time, 0, tuple(shape), axes.dtype), True
