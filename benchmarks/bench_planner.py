"""Plans against uniform recipes and LLM-Drop at the same bytes, on four models; predicted against measured.

    python benchmarks/bench_planner.py                      # all of it; goes on where it stopped
    python benchmarks/bench_planner.py --only demo          # one model again
    python benchmarks/bench_planner.py --long               # the embedded model's plans on rows as long as the context
    python benchmarks/bench_planner.py --table              # only write the page from what was measured

Writes docs/planner_figures.json after each step, docs/planner-figures.md and docs/planner-figures-MODEL.svg. Bytes are
those at 4,096 tokens of context. Losses are measured on shorter rows, with `slots` and long windows at the same number
per token; the rows on which plans are compared here are used for nothing else.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from _planner_models import model, rows_for
from _planner_page import write_page
from _planner_speed import planning_seconds, speeds

import linearize
from linearize.calibration.keys import tokens_key
from linearize.calibration.scores import site_scores
from linearize.plan import PlanEntry
from linearize.planner.candidates import candidate, scored_options
from linearize.planner.choices import entry_of
from linearize.planner.costs import state_bytes
from linearize.planner.make import make_planner
from linearize.planner.measuring import measured_rows
from linearize.planner.pareto import bytes_of_entries, recipe_entries, scored_entries, site_recipes
from linearize.planner.planning import Budget, Planner
from linearize.planner.target import H200
from linearize.progress import Progress
from linearize.recipe import Recipe, Score

ROOT = Path(__file__).resolve().parent.parent
FIGURES, BUILD = ROOT / "docs" / "planner_figures.json", ROOT / "build" / "bench_planner"
CONTEXT = 4096
BUDGETS = (0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 0.8, 1.0)
MODELS = {"demo": 2048, "qwen3": 512, "gpt2": 512, "neox": 512}  # the length of its rows
TOKENS = 4096  # to score on, at most
HELD_ROWS, TEST_ROWS, RANDOM, MEASUREMENTS = 2, 3, 50, 4
LONG_ROWS = slice(6, 8)  # of CONTEXT tokens each, behind all rows above
SEEDS = (0, 1)  # of random plans, RANDOM each

# name of a family: its mixer, what is fixed, and the option that the budget decides
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "slots": ("slots", {"window": 32, "rounds": 4, "decay": 0.97}, "slots"),
    "window": ("window", {"sinks": 4}, "window"),
    "lolcats": ("lolcats", {"sinks": 4, "features": 64}, "window"),
    "moments": ("moments", {"sinks": 4}, "window"),
    "mla": ("mla", {}, "cache"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*MODELS, "speed"], help="these, though they may be in the table")
    parser.add_argument("--recipes", nargs="+", choices=MODELS, help="measure the recipes of these models again")
    parser.add_argument("--long", action="store_true", help="measure the embedded model's plans on rows of the context")
    parser.add_argument("--table", action="store_true", help="only write the page")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    chosen = arguments.table or arguments.recipes or arguments.long
    for name in () if chosen else arguments.only or [*MODELS, "speed"]:
        known = remembered()
        if arguments.only or name not in {**known["models"], **known}:
            figures = speed_figures() if name == "speed" else figures_of(name)
            known = remembered()
            (known if name == "speed" else known["models"])[name] = figures
            remember(known | {"context": CONTEXT, "torch": torch.__version__})
    for name in arguments.recipes or ():
        recipes = bench_of(name).recipes()
        known = remembered()
        known["models"][name]["recipes"] = recipes
        remember(known)
    if arguments.long or not (chosen or arguments.only or "long" in remembered()):
        long = on_long_rows("demo")
        remember(remembered() | {"long": long})
    write_page(remembered(), ROOT / "docs")


def remembered() -> dict[str, Any]:
    """What was measured so far."""
    found: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {"models": {}}
    return found


def remember(known: dict[str, Any]) -> None:
    known["models"] = {name: known["models"][name] for name in MODELS if name in known["models"]}
    FIGURES.write_text(json.dumps(known, indent=1) + "\n")


def speed_figures() -> dict[str, Any]:
    return {"decoding": speeds(model("demo", BUILD)), "planning": planning_seconds()}


def bench_of(name: str) -> Bench:
    source, length = model(name, BUILD), MODELS[name]
    rows = rows_for(name, length, 12)
    data, test = rows[:8], rows[8 : 8 + TEST_ROWS]
    program, tokens = linearize.capture(source), min(4 * length, TOKENS)
    planner = make_planner(program, CONTEXT, H200, data=data, tokens=tokens, progress=True)
    planner.held = planner.held[:HELD_ROWS]
    return Bench(planner, test)


def figures_of(name: str) -> dict[str, Any]:
    started = time.process_time()
    bench = bench_of(name)
    planner, scored = bench.planner, time.process_time() - started
    print(f"{name}: scored", flush=True)
    found: dict[str, Any] = {
        "length": MODELS[name], "source_bytes": planner.source_bytes, "sites": len(planner.teacher.matched),
        "shape": str(planner.teacher.matched[0].attention), "seconds_scoring": scored,
        "test_tokens": sum(row.numel() for row in bench.test),
    }  # fmt: skip
    found["budgets"] = bench.budgets()
    print(f"{name}: budgets", flush=True)
    found["recipes"] = bench.recipes()
    found["random"] = {str(seed): bench.random_plans(seed) for seed in SEEDS}
    found["single"] = single_sites(planner)
    found["seconds"] = time.process_time() - started
    return found


def on_long_rows(name: str) -> list[dict[str, Any]]:
    """The plan of every budget (of scores on short rows) on rows of all positions that the model has, slots and windows
    at the same number per token; and with the sizes of the plan on rows of the context, and on their first part."""
    bench = bench_of(name)
    budgets = [Budget(share * bench.planner.source_bytes, text=f"{share:.0%}") for share in BUDGETS[:-1]]
    plans = [bench.planner.entries(bench.planner.best(budget, MEASUREMENTS)) for budget in budgets]
    predicted = [bench.planner.predicted(bench.planner.best(budget, MEASUREMENTS)) for budget in budgets]
    rows = rows_for(name, CONTEXT, LONG_ROWS.stop)[LONG_ROWS]
    positions = int((bench.planner.teacher.source_config or {})["max_position_embeddings"])
    found = {
        "scaled": bench.measure_on([row[:, :positions] for row in rows], [scaled(plan, positions) for plan in plans]),
        "first": bench.measure_on([row[:, :positions] for row in rows], plans),
        "context": bench.measure_on(rows, plans),
    }
    return [
        {"budget": share, "predicted": loss, "rows": len(rows), "scored": MODELS[name], "positions": positions,
         **{key: statistics.fmean(losses[at]) for key, losses in found.items()}}
        for at, (share, loss) in enumerate(zip(BUDGETS, predicted, strict=False))
    ]  # fmt: skip


def scaled(plan: Sequence[PlanEntry], length: int) -> list[PlanEntry]:
    return [
        entry.model_copy(update={"options": scored_options(entry.mixer, entry.options, CONTEXT, length)})
        for entry in plan
    ]


class Bench:
    """One model's planner, and rows that neither scores nor plans have seen."""

    def __init__(self, planner: Planner, test: Sequence[torch.Tensor]) -> None:
        self.planner, self.test = planner, test
        self.sites = planner.teacher.matched
        rows = list(planner.train)
        found = site_scores(planner.teacher, lambda: rows, tokens_key(rows), [Score("similarity")], Progress(False))
        self.similarity = found["similarity"]

    def measure(self, plans: Sequence[Sequence[PlanEntry]]) -> list[list[float]]:
        return self.measure_on(self.test, plans)

    def measure_on(self, rows: Sequence[torch.Tensor], plans: Sequence[Sequence[PlanEntry]]) -> list[list[float]]:
        return measured_rows(self.planner.teacher, self.planner.train, rows, plans)

    def budgets(self) -> list[dict[str, Any]]:
        found, earlier = [], []
        for share in BUDGETS:
            budget = Budget(share * self.planner.source_bytes, text=f"{share:.0%}")
            started = time.process_time()
            earlier.append(self.planner.best(budget, MEASUREMENTS))
            losses = self.planner.measure(earlier)
            best = earlier[min(range(len(earlier)), key=lambda at: losses[at])]
            seconds = time.process_time() - started
            rivals = {name: plan for name in FAMILIES if (plan := self.family(name, budget)) is not None}
            if (dropped := self.drop(budget)) is not None:
                rivals["llm-drop"] = dropped
            plans = [self.planner.entries(best, scored=True), *(scored for _, scored in rivals.values())]
            rows = self.measure(plans)
            found.append({
                "budget": share, "bytes": self.planner.bytes_of(best), "predicted": self.planner.predicted(best),
                "chosen_on": self.planner.measure([best])[0], "rows": rows[0], "loss": statistics.fmean(rows[0]),
                "plan": [entry.label() for entry in self.planner.entries(best)], "seconds": seconds,
                "rivals": {
                    name: {"bytes": bytes_of_entries(self.planner, whole), "rows": row, "loss": statistics.fmean(row),
                           "mixer": whole[0].label() if name != "llm-drop" else f"{_dropped(whole)} dropped"}
                    for (name, (whole, _)), row in zip(rivals.items(), rows[1:], strict=True)
                },
            })  # fmt: skip
            print(f"{share:.0%}: {found[-1]['loss']:.5f}, rivals "
                  + ", ".join(f"{n} {r['loss']:.4f}" for n, r in found[-1]["rivals"].items()), flush=True)  # fmt: skip
        return found

    def family(self, name: str, budget: Budget) -> tuple[list[PlanEntry], list[PlanEntry]] | None:
        """(at the context, as measured): one mixer everywhere, as large as the budget allows; None where none fits."""
        mixer, fixed, option = FAMILIES[name]
        values: Sequence[Any] = range(1, CONTEXT) if option != "cache" else [x / 1000 for x in range(10, 1000)]

        def total(value: Any) -> int:
            options = {**fixed, option: value}
            return self.planner.base.state_bytes + sum(
                state_bytes(site.attention, mixer, options, CONTEXT) for site in self.sites
            )

        fitting = bisect(values, lambda value: total(value) <= budget.limit)
        if fitting is None:
            return None
        one = candidate(mixer, {**fixed, option: fitting}, CONTEXT, self.planner.train[0].shape[1])
        if any(one.refusal(site) is not None for site in self.sites):
            return None
        if mixer in ("lolcats", "moments"):  # their window is scaled as that of `window` is
            scaled = candidate("window", {"window": fitting}, CONTEXT, self.planner.train[0].shape[1])
            one = replace(one, scored=tuple(sorted({**dict(one.scored), **dict(scaled.scored)}.items())))
        return (
            [entry_of(site, (one,) * site.attention.kv_heads) for site in self.sites],
            [entry_of(site, (one,) * site.attention.kv_heads, scored=True) for site in self.sites],
        )

    def drop(self, budget: Budget) -> tuple[list[PlanEntry], list[PlanEntry]] | None:
        """LLM-Drop: as few attentions deleted as fit the budget, the most similar first; the others are kept."""
        order = sorted(self.sites, key=lambda site: (-self.similarity[site.index], site.index))
        for count in range(len(order) + 1):
            gone = {site.index for site in order[:count]}
            entries = [
                PlanEntry(site=site.index, module=site.module, mixer="drop" if site.index in gone else "keep")
                for site in self.sites
            ]
            if bytes_of_entries(self.planner, entries) <= budget.limit:
                return entries, entries
        return None

    def recipes(self) -> dict[str, Any]:
        """Every built-in recipe at its own bytes, its mixers prepared and not further fitted."""
        plans = {name: recipe_entries(self.planner, Recipe.load(name)) for name in site_recipes()}
        rows = self.measure([scored_entries(self.planner, entries) for entries in plans.values()])
        return {
            name: {"bytes": bytes_of_entries(self.planner, entries), "rows": row, "loss": statistics.fmean(row)}
            for (name, entries), row in zip(plans.items(), rows, strict=True)
        }

    def random_plans(self, seed: int) -> list[dict[str, Any]]:
        """Half with one random candidate a site, half with one a kv head; predicted and measured."""
        draw = random.Random(seed)
        plans = []
        while len(plans) < RANDOM:
            chosen = {}
            for site in self.sites:
                known = self.planner.known[site.index]
                heads = site.attention.kv_heads
                single = [one.candidate for one in known if one.candidate.by_head]
                if len(plans) % 2:
                    chosen[site.index] = tuple(draw.choice(single) for _ in range(heads))
                else:
                    chosen[site.index] = (draw.choice(known).candidate,) * heads
            if self.planner.allowed(chosen):  # caches that are read are kept
                plans.append(chosen)
        rows = self.measure([self.planner.entries(one, scored=True) for one in plans])
        predicted = [self.planner.predicted(one) for one in plans]
        return [{"predicted": loss, "loss": statistics.fmean(row)} for loss, row in zip(predicted, rows, strict=True)]


def single_sites(planner: Planner) -> list[dict[str, Any]]:
    """Every candidate at every site alone: measured loss, and the estimate from gradients."""
    return [
        {"site": site, "candidate": name, "loss": row.loss, "fisher": row.fisher, "error": row.error}
        for site, rows in planner.scores.table.items() for name, row in rows.items()
    ]  # fmt: skip


def bisect(values: Sequence[Any], fits: Callable[[Any], bool]) -> Any | None:
    """The largest of ascending `values` that fits; None where the first does not."""
    low, high = -1, len(values)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(values[middle]) else (low, middle)
    return None if low < 0 else values[low]


def _dropped(entries: Sequence[PlanEntry]) -> int:
    return sum(entry.mixer == "drop" for entry in entries)


if __name__ == "__main__":
    main()
