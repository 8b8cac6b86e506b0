"""Give state to whatever mixes tokens outside of the matched attentions, and leave it as it is otherwise.

Convolutions, scans, linear attentions, token shifts, positions counted from the tokens, refused attentions: each is
found by value (`linearize.rewriting.continuation`), cut out as a small region (`token_mixing`) and run over the new
tokens together with what it needs of the earlier ones. Without anything of the kind the program stays as it is.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from linearize.errors import RewriteError
from linearize.passes.rewrite.insert_mixers import InsertMixers
from linearize.passes.rewrite.raise_attention import RaiseAttention
from linearize.passes.rewrite.stretch import Stretch, Threads
from linearize.passes.rewrite.token_mixing import Region, find_region, is_running_sum
from linearize.passes.rewrite.trial import Trial
from linearize.pipeline import Keeps, Stage
from linearize.plan import Plan, PlanEntry
from linearize.program import MASK, Program, op_name
from linearize.rewriting.continuation import Continuation, probe_lengths, read_continuation, record
from linearize.rewriting.editor import Editor
from linearize.verify import pieces_difference

aten = torch.ops.aten
TOLERANCE = 2e-5
COSTS = {
    "sum": "a running sum ({} numbers)",
    "finite": "its last inputs ({} numbers)",
    "history": "the history of its inputs ({} numbers a token, growing)",
}


@dataclass(frozen=True)
class Form:
    """How a region is continued: `sum`, `finite` with its `context`, or `history`, but for the entries in `idle`, whose
    past nothing reads."""

    kind: str
    context: int = 0
    idle: frozenset[str] = frozenset()


@dataclass(frozen=True)
class CarryHistory:
    """Exact. What cannot be continued (it looks ahead) leaves the program whole, with `stateless_reason`."""

    name: ClassVar[str] = "carry_history"
    stage: ClassVar[Stage] = Stage.REWRITE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        if program.device.type == "meta" or not (program.refused or pieces_difference(program)[0] > TOLERANCE):
            return program
        reading = read_continuation(program)
        try:
            forms = choose_forms(program, reading)
            return _carried(program, reading, forms)
        except RewriteError as error:
            return program.replace(stateless_reason=str(error))


def read_carried(captured: Program) -> tuple[str, ...]:
    """What `compile` would report of everything in a captured program that mixes tokens and is no matched attention."""
    if captured.is_static:
        return ()  # it cannot be run in pieces, nor compiled
    entries = tuple(PlanEntry(site=site.index, module=site.module, mixer="keep") for site in captured.matched)
    program = CarryHistory().run(InsertMixers(Plan(entries=entries)).run(RaiseAttention().run(captured)))
    return program.notes[len(captured.notes) :]


def choose_forms(program: Program, reading: Continuation) -> dict[str, Form]:
    """The cheapest form by name of each node that is not continued.

    Raises:
        RewriteError: a region looks ahead, or takes in state of another.
    """
    reading.right.update(reading.wrong)  # as they will be
    regions, problem = _regions(reading)
    wanted = {node for region in regions for node in (region.target, *region.entries, *region.constants)}
    values = record(program, wanted, probe_lengths(program)[0])
    forms = {region.target.name: _form(program, region, reading, values) for region in regions}
    forms = _idle_everywhere(regions, forms)
    if problem is not None:  # told last: an earlier region that looks ahead may be why a later one looks odd
        raise problem
    return forms


def _idle_everywhere(regions: list[Region], forms: dict[str, Form]) -> dict[str, Form]:
    """An entry is idle where every region that reads its history says so: they share one."""
    needed = {
        node.name
        for region in regions
        for node in region.entries
        if forms[region.target.name].kind == "history" and node.name not in forms[region.target.name].idle
    }
    return {name: replace(form, idle=form.idle - needed) for name, form in forms.items()}


def _regions(reading: Continuation) -> tuple[list[Region], RewriteError | None]:
    """The regions up to the first that cannot be cut out, and why it cannot."""
    regions = []
    for node in reading.wrong:
        try:
            regions.append(find_region(node, reading))
        except RewriteError as error:
            return regions, error
    return regions, None


def _form(program: Program, region: Region, reading: Continuation, values: dict[fx.Node, object]) -> Form:
    if is_running_sum(region, reading):
        return Form("sum")
    trial = Trial(program, region, reading, values)
    ahead = trial.looks_ahead()
    if ahead is not None:
        raise RewriteError(
            f"{region.scope}: {region.target.name} = {op_name(region.target)} looks ahead; what it gives for the first "
            f"{ahead} token(s) changes when later ones come"
        )
    context = trial.context()
    if context is not None:
        return Form("finite", context)
    return Form("history", idle=frozenset(node.name for node in trial.without_past()))


def _carried(program: Program, reading: Continuation, forms: dict[str, Form]) -> Program:
    module = program.copy_graph()
    copies = {node.name: node for node in module.graph.nodes}
    reading = reading.renamed(copies)
    editor = Editor(module, CarryHistory.name)
    threads = Threads(editor, reading)
    everything = Stretch(threads, None)
    carried: dict[str, Counter[str]] = {}
    for name, form in forms.items():
        region = find_region(copies[name], reading)
        before = len(threads.states)
        new = _continue(region, form, threads, everything, copies[MASK])
        threads.stands_for(region.target, new)
        carried.setdefault(region.scope, Counter())[form.kind] += threads.numbers(before)
    threads.finish()
    names = tuple(str(node.target) for node in module.graph.nodes if "state" in node.meta)
    return program.replace(
        module=editor.finish(), state_names=names, stateless_reason="", notes=(*program.notes, *_notes(carried))
    )


def _continue(region: Region, form: Form, threads: Threads, everything: Stretch, mask: fx.Node) -> fx.Node:
    with threads.editor.at(region.target):
        if form.kind == "sum":
            return threads.running_sum(region.target)
        stretch = Stretch(threads, form.context - 1) if form.kind == "finite" else everything
        remembered = [node for node in region.entries if node.name not in form.idle]
        if stretch.size is None:
            stretch.enter(remembered[0] if remembered else mask)
        for node in remembered:
            stretch.enter(node)
        idle = [node for node in region.entries if node.name in form.idle]
        for node in idle:
            stretch.enter_idle(node)
        return stretch.last(region.target, stretch.lift(region), partly=bool(idle))


def _notes(carried: dict[str, Counter[str]]) -> list[str]:
    """One line for each module that keeps something, with what it costs for a row of the batch."""
    return [
        f"{scope}: looks at other tokens and is no matched attention; kept as it is, with "
        + " and ".join(COSTS[kind].format(count) for kind, count in kinds.items() if count)
        for scope, kinds in carried.items()
        if kinds.total()
    ]
