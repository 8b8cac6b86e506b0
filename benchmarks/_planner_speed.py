"""Predicted against measured decoding of the embedded model on this CPU, and how long planning a large model takes."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import torch
from torch import nn

import linearize
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.planner.costs import base_cost, decode_calls
from linearize.planner.cpu import calibrate
from linearize.planner.heads import mixtures
from linearize.planner.solver import Option, frontier, solve
from linearize.planner.source import source_calls
from linearize.runtime.speed import filled_cache
from linearize.runtime.state import State

CONTEXTS, READ, STEPS = (512, 4096, 16384), 512, 64
SLOTS = ("slots", {"window": 32, "slots": 128, "rounds": 4, "decay": 0.97})
LOLCATS = ("lolcats", {"window": 64, "features": 128, "sinks": 4})
KEPT = 1  # the site that `hybrid` keeps


@torch.no_grad()
def speeds(source: nn.Module) -> list[dict[str, Any]]:
    """Seconds a token of the source, and of three compiled models; each alone, the best tenth of its steps."""
    captured = linearize.capture(source)
    teacher = run_pipeline(captured, [RaiseAttention()])
    base, target = base_cost(teacher), calibrate()
    found = []
    for context in CONTEXTS:
        seconds = steps_of_source(source, context)
        predicted = target.seconds(source_calls(source, context), graph=False)
        found.append({"model": "source", "context": context, "measured": seconds, "predicted": predicted})
    for name in ("slots", "lolcats", "hybrid"):
        chosen = {site.index: SLOTS if name == "slots" else LOLCATS for site in teacher.matched}
        chosen |= {KEPT: ("keep", {})} if name == "hybrid" else {}
        entries = tuple(
            PlanEntry(site=site.index, module=site.module, mixer=chosen[site.index][0], options=chosen[site.index][1])
            for site in teacher.matched
        )
        compiled = linearize.compile(captured, plan=Plan(entries=entries), tokens=0, progress=False)
        for context in CONTEXTS:
            predicted = target.seconds(decode_calls(base, teacher.matched, entries, context, 1))
            seconds = steps_of_compiled(compiled, context)
            found.append({"model": name, "context": context, "measured": seconds, "predicted": predicted})
    return found


def steps_of_source(source: nn.Module, context: int) -> float:
    tokens = torch.arange(context).unsqueeze(0) % 1000
    held = [filled_cache(source, tokens, context)]

    def step() -> None:
        held[0] = source(tokens[:, -1:], past_key_values=held[0], use_cache=True).past_key_values

    return timed(step)


def steps_of_compiled(compiled: Any, context: int) -> float:
    """From a state that has read 512 tokens, a cache in it repeated to the context."""
    tokens = torch.arange(READ).unsqueeze(0) % 1000
    _, state = compiled.step(tokens)
    tensors = [
        value if spec.grows is None else value.repeat_interleave(context // READ, dim=spec.grows + 1)
        for spec, value in zip(state.specs, state.values(), strict=True)
    ]
    held = [State(state.specs, tensors, context)]

    def step() -> None:
        held[0] = compiled.step(tokens[:, -1:], held[0])[1]

    return timed(step)


def timed(step: Any) -> float:
    """Of the best tenth: what else the machine does only adds."""
    step()
    seconds = []
    for _ in range(STEPS):
        started = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - started)
    return sorted(seconds)[STEPS // 10]


def planning_seconds(layers: int = 32, heads: int = 8, candidates: int = 8, draws: int = 128) -> dict[str, float]:
    """From scores that are there: the frontier of every layer with heads that differ, and the choice, for ten
    budgets."""
    generator = np.random.default_rng(0)
    started = time.perf_counter()
    items = [layer_options(generator, heads, candidates, draws) for _ in range(layers)]
    fronts = time.perf_counter() - started
    total = sum(item[-1].cost for item in items)
    for tenth in range(1, 11):
        solve(items, total * tenth / 10)
    return {"layers": layers, "heads": heads, "candidates": candidates, "frontiers": fronts,
            "ten budgets": time.perf_counter() - started - fronts}  # fmt: skip


def layer_options(generator: np.random.Generator, heads: int, candidates: int, draws: int) -> list[Option]:
    """Errors like a model's: of a candidate alike in all heads in part, smaller where it costs more."""
    costs = np.sort(generator.integers(1, 4096, candidates)).astype(float)
    vectors = generator.normal(size=(heads, candidates, draws)) + generator.normal(size=(heads, 1, draws))
    vectors *= generator.uniform(0.5, 2, (heads, candidates, 1)) / costs[:, None] / draws**0.5
    rows = mixtures(vectors, costs)
    chosen = vectors[np.arange(heads), rows].sum(1)
    losses = 0.5 * np.square(chosen).sum(1)
    return frontier([
        Option(float(loss), float(costs[row].sum()), tuple(row)) for loss, row in zip(losses, rows, strict=True)
    ])  # fmt: skip
