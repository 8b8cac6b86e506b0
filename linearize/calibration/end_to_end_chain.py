"""Teacher and student block by block, for distillation that cannot hold, or does not want to hold, all of it at once.

A piece is what stands between two cuts (`blocks`), once of the teacher and once of the student: the same nodes cross
the cuts of both. The two run side by side, so that the weights of a block are asked for once. Two uses:

    several processes   what is trained in a piece is sharded over them and gathered while it runs (`sharding`)
    a model on disk     a piece's weights are read when it runs; of the student only what crosses the cuts is kept for
                        the way back, where each piece runs again (activation checkpointing), from the last to the first

What comes out is what `Pair` computes on whole graphs: same nodes, same operators, same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from linearize.calibration.blocks import Blocks
from linearize.calibration.chunked_kl import Head
from linearize.calibration.end_to_end_pair import Pair, head_of, starting_values
from linearize.calibration.parallel import world
from linearize.calibration.sharding import sharded
from linearize.errors import RewriteError
from linearize.program import Program
from linearize.rewriting.pieces import cut_out
from linearize.rewriting.walk import parameter, place_of
from linearize.weights import ATTACHED, give_memory_back

Values = list[Tensor]


class Piece(nn.Module):
    """The student's part of a block as a module with a forward, which is what can be sharded. `names`: parameters that
    are read from disk for it, with `weights` not None."""

    def __init__(self, module: fx.GraphModule, program: Program, names: set[str]) -> None:
        super().__init__()
        self.module = module
        self._weights, self._names = program.weights, names
        if program.weights is not None:
            setattr(module, ATTACHED, program.weights)

    def forward(self, *given: Any) -> Values:
        if self._weights is None:
            return list(self.module(*given))
        return list(checkpoint(self._from_disk, *given, use_reentrant=False, preserve_rng_state=False))

    def _from_disk(self, *given: Any) -> Values:
        hold(self._weights, self._names)
        return list(_Reader(self.module).run(*given))


class Stretch(NamedTuple):
    """One block of both sides; the first `crossing` of what a side returns goes into the next, the rest are taps."""

    teacher: fx.GraphModule
    student: Piece
    crossing: int


class Chain(Pair):
    """As `Pair`, in pieces."""

    stretches: list[Stretch]

    @staticmethod
    def of(teacher: Program, student: Program) -> Chain:
        """
        Raises:
            RewriteError: the logits are no linear map of hidden states, or what crosses the teacher's cuts is not in
                the student.
        """
        whole = Pair.of(teacher, student)
        chain = Chain(whole.teacher, whole.student)
        chain.stretches = list(_stretches(teacher, student))
        return chain

    def values(self, ids: Tensor) -> tuple[Values, Values]:
        teacher, student, taps = Values(), Values(), (Values(), Values())
        for stretch in self.stretches:
            with torch.no_grad():
                theirs = self._teacher(stretch, [*teacher, *self._given(self.teacher.program, stretch.teacher, ids)])
            ours = stretch.student(*student, *self._given(self.student.program, stretch.student.module, ids))
            teacher, student = theirs[: stretch.crossing], ours[: stretch.crossing]
            taps[0].extend(ours[stretch.crossing :])
            taps[1].extend(theirs[stretch.crossing :])
        return [*student, *taps[0]], [*teacher, *taps[1]]

    @contextmanager
    def shared_out(self, shard: bool) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
        if not shard or world() == 1:
            yield {}
            return
        with sharded([stretch.student for stretch in self.stretches]) as stands:
            yield stands

    def heads(self) -> tuple[Head, Head]:
        for side in (self.student, self.teacher):
            hold(side.program.weights, side.head_names)
        return super().heads()

    def _teacher(self, stretch: Stretch, given: list[Any]) -> Values:
        if self.teacher.program.weights is None:
            return list(stretch.teacher(*given))
        hold(self.teacher.program.weights, stretch.student._names)
        return list(_Reader(stretch.teacher).run(*given))

    def _given(self, program: Program, module: fx.GraphModule, ids: Tensor) -> Values:
        """Of the placeholders behind those that cross."""
        inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
        return starting_values(program, [node for node in inputs if "crosses" not in node.meta], ids)


def _stretches(teacher: Program, student: Program) -> Iterator[Stretch]:
    blocks, known = Blocks(teacher), student.nodes_by_name()
    order = {node: index for index, node in enumerate(teacher.graph.nodes)}
    taps = list(_taps(teacher, student))
    last = [head_of(teacher)[0].args[0]], [head_of(student)[0].args[0]]
    before: tuple[list[Any], list[Any]] = [], []
    for cut in range(len(blocks.crossing)):
        ends = cut + 1 == len(blocks.crossing)
        after = last if ends else (blocks.crossing[cut + 1], _same(blocks.crossing[cut + 1], known, student))
        upto = len(order) if ends else max(order[node] for node in after[0])
        here = [pair for pair in taps if order[pair[0]] <= upto]
        taps = [pair for pair in taps if order[pair[0]] > upto]
        theirs = cut_out(teacher.module, before[0], [*after[0], *(tap for tap, _ in here)])
        ours = cut_out(student.module, before[1], [*after[1], *(tap for _, tap in here)])
        for module in (theirs, ours):
            _mark(module, len(before[0]), teacher)
        names = {str(node.target) for one in (theirs, ours) for node in one.graph.nodes if node.op == "get_attr"}
        yield Stretch(theirs, Piece(ours, student, names), len(after[0]))
        before = after


def _taps(teacher: Program, student: Program) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Those of `Pair`, in its order."""
    theirs, ours = teacher.nodes_by_name(), student.nodes_by_name()
    for one, other in Pair.taps(teacher, student):
        yield theirs[one], ours[other]


def _same(nodes: Sequence[fx.Node], known: dict[str, fx.Node], student: Program) -> list[fx.Node]:
    lost = [node.name for node in nodes if node.name not in known]
    if lost:
        raise RewriteError(
            f"{student.model_name} cannot be distilled block by block: {lost[0]}, which crosses from one block of the "
            "source to the next, was rewritten; distil it in memory, on one process or with distill.shard = false"
        )
    return [known[node.name] for node in nodes]


def _mark(module: fx.GraphModule, crossing: int, teacher: Program) -> None:
    inputs = [node for node in module.graph.nodes if node.op == "placeholder"]
    for node in inputs[:crossing]:
        node.meta["crosses"] = True
    if teacher.weights is not None:
        setattr(module, ATTACHED, teacher.weights)


def hold(weights: Any, names: set[str]) -> None:
    """The weights of a piece, and no others, of a model that stays on disk."""
    if weights is not None:
        weights.hold(names)
        give_memory_back()


class _Reader(fx.Interpreter):
    """Runs a piece whose parameters are on disk: each is read where it is asked for; constants that the graph makes on
    the meta device are made where the weights are."""

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        return parameter(self.module, str(target))

    def call_function(self, target: Callable[..., Any] | str, args: Any, kwargs: Any) -> Any:
        if str(kwargs.get("device")) == "meta":
            kwargs = {**kwargs, "device": place_of(self.module)}
        return super().call_function(target, args, kwargs)
