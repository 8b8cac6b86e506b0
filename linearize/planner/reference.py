"""Whole steps of a known model, timed: what operators cost more in a step than each alone.

Between its neighbours an operator finds other code and other tensors in the caches, and Python around it. So the step
of the embedded model takes more than the sum of its operators: that much is put on every node of a compiled graph, and
for the source's own step on every module; and what a long cache adds to a step beyond the prediction, on the bytes that
its attention reads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.capture import capture
from linearize.capture.hf import load_model
from linearize.passes.lower import LOWER_PASSES
from linearize.passes.rewrite import InsertMixers, RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.planner.costs import base_cost, decode_calls
from linearize.planner.counting import MODULE, Call
from linearize.planner.source import source_calls
from linearize.planner.target import Target
from linearize.program import Program, StateTensor
from linearize.runtime.engine import Engine
from linearize.runtime.speed import filled_cache
from linearize.runtime.state import State

SHORT, LONG = 512, 8192
Mixer = tuple[str, dict[str, Any]]
SLOTS: Mixer = ("slots", {"slots": 64, "window": 32})
KEEP: Mixer = ("keep", {})
Measure = Callable[[Sequence[Callable[[], Any]], float], float]


@torch.no_grad()
def settle(target: Target, fastest: Measure) -> Target:
    """`target` with the overheads, and the times of attention over a cache, at which the embedded model's steps take
    what they take."""
    source = load_model(str(Path(__file__).parent.parent / "demo_model"))
    teacher = run_pipeline(capture(source), [RaiseAttention()])
    base = base_cost(teacher)

    def planned(mixer: Mixer, context: int) -> tuple[list[Call], float]:
        entries = [PlanEntry(site=s.index, module=s.module, mixer=mixer[0], options=mixer[1]) for s in teacher.matched]
        lowered = run_pipeline(teacher, [InsertMixers(Plan(entries=tuple(entries))), *LOWER_PASSES])
        calls = decode_calls(base, teacher.matched, entries, context, 1)
        return calls, fastest([_step(lowered, context)], 1.0)

    def own(context: int) -> tuple[list[Call], float]:
        return source_calls(source, context), fastest([_source_step(source, context)], 1.0)

    calls, measured = planned(SLOTS, SHORT)
    missing = max(0.0, measured - target.seconds(calls))
    target = target.model_copy(update={"node_overhead": target.node_overhead + missing / len(calls)})
    calls, measured = own(SHORT)
    missing = max(0.0, measured - target.seconds(calls, graph=False))
    modules = sum(call.name == MODULE for call in calls)
    target = target.model_copy(update={"module_overhead": target.module_overhead + missing / modules})
    target = with_cache(target, planned(KEEP, SHORT), planned(KEEP, LONG), graph=True)
    return with_cache(target, own(SHORT), own(LONG), graph=False)


def with_cache(
    target: Target, short: tuple[list[Call], float], long: tuple[list[Call], float], graph: bool
) -> Target:
    """From two steps, (operators, seconds measured): the timed operator whose bytes grow most takes what the longer
    step grows more than predicted, by the byte."""
    grown = {name: _moved(long[0], name) - _moved(short[0], name) for name in target.timed if name != "cat"}
    name = max(grown, key=lambda key: grown[key])
    predicted = target.seconds(long[0], graph) - target.seconds(short[0], graph)
    missing = max(0.0, long[1] - short[1] - predicted)
    if grown[name] <= 0:
        return target
    more = missing / grown[name]
    points = [(at, near + more * at, far + more * at) for at, near, far in target.timed[name]]
    return target.model_copy(update={"timed": {**target.timed, name: points}})


def _moved(calls: Sequence[Call], name: str) -> int:
    return sum(call.bytes for call in calls if call.name == name)


def _step(program: Program, context: int) -> Callable[[], Any]:
    engine, token = Engine(program), torch.ones(1, 1, dtype=torch.int64)
    state = State(engine.state_specs, [_filled(spec, context) for spec in engine.state_specs], context)
    return lambda: engine.advance(program.module, token, state)


def _filled(state: StateTensor, context: int) -> torch.Tensor:
    """Of the size that it has behind `context` tokens."""
    shape = [context if dim == state.grows else size for dim, size in enumerate(state.shape)]
    return torch.ones([1, *shape] if state.batched else shape).to(state.dtype)


def _source_step(source: nn.Module, context: int) -> Callable[[], Any]:
    tokens = torch.ones(1, context, dtype=torch.int64)
    cache = filled_cache(source, tokens, context)
    return lambda: source(tokens[:, -1:], past_key_values=cache, use_cache=True)
