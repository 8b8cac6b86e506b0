"""Predicted against measured decoding of the embedded model on this CPU, and how long planning a large model takes."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import numpy as np
import torch
from torch import nn

import linearize
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.planner.candidates import default_candidates
from linearize.planner.costs import Base, base_cost, decode_calls
from linearize.planner.cpu import calibrate
from linearize.planner.planning import Budget, Planner
from linearize.planner.scores import WIDTH, Scored, Scores
from linearize.planner.source import source_calls
from linearize.planner.target import H200
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


def planning_seconds(layers: int = 32, heads: int = 8, candidates: int = 8) -> dict[str, float]:
    """CPU time from scores that are there: what every layer can be, with heads that differ and their exact bytes, and
    the choice and the plans near it for ten budgets. The scores are made up; candidates and bytes are a Llama's."""
    planner = planner_of(layers, heads, candidates)
    started = time.process_time()
    for site in planner.teacher.matched:
        planner.frontier(site)
    fronts = time.process_time() - started
    for tenth in range(1, 11):
        budget = Budget(planner.source_bytes * tenth / 10)
        planner.neighbours(planner.solve(budget), budget)
    return {"layers": layers, "heads": heads, "candidates": candidates, "frontiers": fronts,
            "ten budgets": time.process_time() - started - fronts}  # fmt: skip


def planner_of(layers: int, heads: int, candidates: int) -> Planner:
    """One captured layer, so many times."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = LlamaConfig(
        vocab_size=64, hidden_size=16 * heads, intermediate_size=32, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=heads, head_dim=16,
    )  # fmt: skip
    teacher = run_pipeline(linearize.capture(LlamaForCausalLM(shape).eval()), [RaiseAttention()])
    sites = tuple(dataclasses.replace(teacher.matched[0], index=index) for index in range(layers))
    able = [one for one in default_candidates(4096, 1024, 16) if one.by_head]
    wanted = {site.index: [*able[: candidates - 1], able[-1]] for site in sites}
    generator = np.random.default_rng(0)
    table = {
        site: {one.measured_as: made_up(generator, at, heads, one.mixer) for at, one in enumerate(some)}
        for site, some in wanted.items()
    }
    planner = Planner(dataclasses.replace(teacher, sites=sites), 4096, 1, wanted, Scores(table, 4096), H200)
    planner.__dict__["base"] = Base(0, 0, (), {site.index: () for site in sites})
    return planner


def made_up(generator: np.random.Generator, place: int, heads: int, mixer: str) -> Scored:
    """Errors of heads alike in part, smaller for later candidates."""
    effects = generator.normal(size=(heads, WIDTH)) + generator.normal(size=WIDTH)
    effects *= 0.0 if mixer == "keep" else 0.01 * 0.5**place * generator.uniform(0.5, 2, (heads, 1))
    alone, together = 0.5 * np.square(effects).sum(1), 0.5 * float(np.square(effects.sum(0)).sum())
    return Scored(together, 0.1, together, alone.tolist(), effects.tolist())
