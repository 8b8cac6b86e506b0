"""Every recipe on the embedded model, at the same fitting tokens: what it loses, what it carries, how fast it decodes.

    python benchmarks/bench_recipes.py                          # all recipes that the installed package has
    python benchmarks/bench_recipes.py --only slots transmla    # these, again
    python benchmarks/bench_recipes.py --markdown docs/recipe-figures.md

Writes docs/recipe_figures.json after each recipe and goes on where it stopped. Windows are 32 where a recipe has one;
the held-out text and the recall sequences (33 to 400 tokens back) are the demo's. Decoding is measured against the
source, steps in turn, at context 4,096 on one thread: read the ratio.
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import linearize
from linearize.calibration.data import split_rows
from linearize.calibration.demo import held_out_documents, recall_batches, recall_edges, text_rows
from linearize.calibration.evaluate import agreement, logits_of, mixers_of, overall, perplexity, recall, site_errors
from linearize.calibration.samples import sample_teacher
from linearize.errors import RecipeError
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.printing import Figure, bytes_text
from linearize.progress import Progress
from linearize.recipe import Recipe
from linearize.runtime.speed import decode_speeds

ROOT = Path(__file__).resolve().parent.parent
FIGURES = ROOT / "docs" / "recipe_figures.json"
WINDOW, LENGTH, TEXT_ROWS, RECALL_ROWS, SPEED_CONTEXT, STEPS = 32, 512, 16, 8, 4096, 24


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="RECIPE", help="these recipes, though they may be in the table")
    parser.add_argument("--tokens", type=int, default=16_384, help="token positions that every recipe may fit on")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="also write the table as a page")
    parser.add_argument("--table", action="store_true", help="only print what was measured already")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {"recipes": {}}
    if not arguments.table:
        known = {**known, "tokens": arguments.tokens, "torch": torch.__version__, "machine": platform.platform()}
        measure_all(known, arguments.only or [*linearize.recipes()], bool(arguments.only))
    figure = table(known)
    Console(width=200).print(figure.drawn())
    if arguments.markdown:
        arguments.markdown.write_text(page(known, figure))


def measure_all(known: dict[str, Any], names: list[str], again: bool) -> None:
    """Fill `known["recipes"]`, writing the file after each."""
    bench = Bench(known["tokens"])
    if "source" not in known["recipes"]:
        known["recipes"]["source"] = bench.source_row()
    for name in names:
        if name in known["recipes"] and not again:
            continue
        known["recipes"][name] = row = bench.row(name)
        figures = f"mse {row['mse']:.4f}, perplexity {row['perplexity']:.2f}, recall {row['recall']:.1%}"
        print(f"{name}: {figures}", flush=True)
        FIGURES.write_text(json.dumps(known, indent=1) + "\n")


class Bench:
    """The source, its samples and the held-out data, made once."""

    def __init__(self, tokens: int) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = linearize.demo_model_dir()
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder)
        self.program = linearize.capture(self.model)
        self.teacher = run_pipeline(self.program, [RaiseAttention()])
        self.samples = split_rows(sample_teacher(self.teacher, tokens, LENGTH, 0, Progress(True)), 4)
        self.text = [*text_rows(tokenizer, held_out_documents(), TEXT_ROWS, LENGTH).split(4)]
        self.recall = recall_batches(len(tokenizer), WINDOW, RECALL_ROWS, seed=1)
        self.rows = [self.text[0], self.recall[0].input_ids[:4], self.recall[2].input_ids[:4]]

    def source_row(self) -> dict[str, Any]:
        return {**self.quality(self.model), "mse": 0.0, "mixers": ["softmax"], "seconds": 0.0, "parameters": 0}

    def quality(self, model: torch.nn.Module) -> dict[str, Any]:
        student = logits_of(model)
        found = recall(student, self.recall, recall_edges(WINDOW))
        close = agreement(logits_of(self.model), student, self.text)
        return {
            "perplexity": perplexity(student, self.text),
            "top1": close.top1,
            "kl": close.kl,
            "recall": overall(found),
            "recall_by_distance": {f"{part.low}-{part.high}": part.accuracy for part in found},
        }

    def row(self, name: str) -> dict[str, Any]:
        """Compile by the recipe, fitted on the shared samples, and measure."""
        started = time.perf_counter()
        model = linearize.compile(self.program, with_window(name), calibration=self.samples, progress=True)
        seconds = time.perf_counter() - started
        errors = site_errors(self.teacher, mixers_of(model.source), self.rows)
        source, compiled = decode_speeds(self.model, model, SPEED_CONTEXT, STEPS)
        return {
            **self.quality(model),
            "mse": sum(errors.values()) / len(errors),
            "mse_by_site": errors,
            "mixers": [entry.label() for entry in model.plan.entries],
            "state_4k": model.state_bytes(1, 4096),
            "state_64k": model.state_bytes(1, 65_536),
            "speed": compiled.tokens_per_second / source.tokens_per_second,
            "seconds": seconds,
            "fitted": model.report.tokens_fitted,
            "parameters": sum(row.parameters or 0 for row in model.report.sites),
        }


def with_window(name: str) -> Recipe:
    recipe = Recipe.load(name)
    try:
        return recipe.with_options(window=WINDOW)
    except RecipeError:
        return recipe


def table(known: dict[str, Any]) -> Figure:
    rows = known["recipes"]
    ranges = list(rows["source"]["recall_by_distance"])
    lines = []
    for name, row in sorted(rows.items(), key=lambda item: item[1]["mse"]):
        recalls = [f"{row['recall_by_distance'][part]:.0%}" for part in ranges]
        carried = [bytes_text(row[key]) if key in row else "-" for key in ("state_4k", "state_64k")]
        quality = (f"{row['mse']:.4f}", f"{row['perplexity']:.2f}", f"{row['top1']:.1%}", f"{row['recall']:.1%}")
        speed = f"{row['speed']:.2f}" if "speed" in row else "1"
        lines.append((name, *quality, *recalls, *carried, speed))
    heads = ("recipe", "MSE", "perplexity", "top-1", "recall", *ranges, "state 4k", "64k", "speed 4k")
    title = f"recipes on the embedded model, {known['tokens']:,} token positions to fit on, window {WINDOW}"
    return Figure(title, heads, lines, words=("recipe",))


def page(known: dict[str, Any], figure: Figure) -> str:
    return f"""# Recipes, measured

Written by `python benchmarks/bench_recipes.py --markdown docs/recipe-figures.md` (torch {known["torch"]}, one thread).

{figure.markdown()}

MSE is the mean over sites of the relative error of the attention's output, each mixer fed the source's own inputs, on
held-out text and recall. Perplexity and top-1 agreement are on held-out text of {LENGTH} tokens a row, recall is top-1
accuracy where the answer stands that far back. State is for one sequence; a source's cache at 4k is
{bytes_text(2 * 4 * 2 * 32 * 4 * 4096)}. Speed is decoding at context 4,096 relative to the source with its cache, steps
taken in turn, on a machine that was busy with other work: ratios within a third of each other say nothing. Every
recipe has the same samples of the source to fit on; how often it passes over them is its own.
`svd-llm` changes weights and no mixer, so its MSE is 0 by definition; its weights are 80 % of the source's.
Latent attention against an SVD of the weights at the same cache: `benchmarks/bench_mla.py`, docs/mla_figures.json.
"""


if __name__ == "__main__":
    main()
