"""Predicted against measured time of a decoded token on this CPU: the source and recipes, at three contexts.

    python benchmarks/bench_decode_time.py [--json FILE]

The target `cpu` is timed anew. A measurement is the fastest of many steps, so the table holds on a machine that other
work uses now and then; what it takes on a busy one is more.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

import linearize
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.planner.costs import base_cost, decode_calls
from linearize.planner.cpu import calibrate
from linearize.planner.source import source_calls
from linearize.runtime.speed import filled_cache, timed

CONTEXTS = (512, 4096, 16384)
RECIPES = ("none", "auto", "lolcats{window=32}", "liger{window=32}", "streaming-llm")
STEPS = 60


@torch.no_grad()
def rows() -> list[dict[str, Any]]:
    target = calibrate()
    source = AutoModelForCausalLM.from_pretrained(linearize.demo_model_dir()).eval()
    teacher = run_pipeline(linearize.capture(source), [RaiseAttention()])
    base, found = base_cost(teacher), []
    models = {recipe: linearize.compile(source, recipe, tokens=0, progress=False) for recipe in RECIPES}
    for context in CONTEXTS:
        tokens = (torch.arange(context) % 1000).unsqueeze(0)
        cache = filled_cache(source, tokens, context)
        predicted = target.seconds(source_calls(source, context), graph=False)
        measured = fastest(lambda cache=cache, last=tokens[:, -1:]: source(last, past_key_values=cache, use_cache=True))
        found.append(row("source", context, predicted, measured))
        for recipe, model in models.items():
            _, state = model.prefill(tokens)
            entries = [entry for entry in model.plan.entries]
            predicted = target.seconds(decode_calls(base, teacher.matched, entries, context, 1))
            measured = fastest(lambda model=model, state=state, last=tokens[:, -1]: model.decode(last, state))
            found.append(row(recipe, context, predicted, measured))
    return found


def row(model: str, context: int, predicted: float, measured: float) -> dict[str, Any]:
    return {"model": model, "context": context, "predicted_ms": 1e3 * predicted, "measured_ms": 1e3 * measured}


def fastest(step: Callable[[], Any]) -> float:
    for _ in range(3):
        step()
    return min(timed(step) for _ in range(STEPS))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    found = rows()
    print("| model | context | predicted, ms | measured, ms | predicted / measured |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for one in found:
        ratio = one["predicted_ms"] / one["measured_ms"]
        shown = f"{one['predicted_ms']:.2f} | {one['measured_ms']:.2f} | {ratio:.2f}"
        print(f"| {one['model']} | {one['context']:,} | {shown} |")
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
