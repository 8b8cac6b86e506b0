"""Fitting, compared: closed form and what follows against gradient-only LoLCATs, and recall by distance.

    python benchmarks/bench_calibration.py                     # what is not in docs/calibration_figures.json yet
    python benchmarks/bench_calibration.py --only recall       # one part again: fit, recall, distill
    python benchmarks/bench_calibration.py --table             # only write docs/calibration-figures.md and the plots

fit: on the same 32,768 tokens of the embedded model's own samples and at the same state bytes. The reference is
LoLCATs' attention transfer (Zhang et al. 2024): Hedgehog maps that start as the identity, c = sigmoid(g) that starts at
0.1, Adam on the output MSE alone, learning rate searched. Seconds are CPU seconds of one thread, sampling left out.
recall: top-1 accuracy where the answer stands that far back, by segments of 32 tokens that come again behind filler.
distill: the end-to-end stage on top of a fit.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn

import linearize
from linearize.calibration.data import split_rows
from linearize.calibration.demo import held_out_documents, recall_batches, recall_edges, text_rows
from linearize.calibration.evaluate import agreement, logits_of, mixers_of, overall, perplexity, recall, site_errors
from linearize.calibration.recall import RecallBatch, repeated_segments
from linearize.calibration.samples import sample_teacher
from linearize.distill import Distill
from linearize.mixers import Mixer
from linearize.mixers.lolcats import Lolcats
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.printing import Figure, bytes_text
from linearize.progress import Progress
from linearize.recipe import Fit, Recipe
from linearize.spec import AttentionSpec
from linearize.svg import Line, line_plot

DOCS = Path(__file__).resolve().parent.parent / "docs"
FIGURES, PAGE = DOCS / "calibration_figures.json", DOCS / "calibration-figures.md"
PLOT = DOCS / "calibration-recall.svg"
WINDOW, TOKENS, LENGTH, TEXT_ROWS, EPOCHS = 32, 32_768, 512, 16, 4
RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
SMALL = f"window={WINDOW},features=32,sinks=0"  # the size of the reference
CONTEXT, SEGMENT, RECALL_ROWS = 2048, 32, 4
EDGES = (33, 65, 129, 257, 513, 1025, 2001)
PAPER = "lolcats_paper"


@linearize.register_mixer
class PaperLolcats(Lolcats):
    """LoLCATs as published, but for the state, which is kept by kv head so that bytes are equal: c = sigmoid(g)."""

    name = PAPER

    def __init__(self, spec: AttentionSpec, window: int = 32) -> None:
        super().__init__(spec, window=window)
        del self.omega
        self.g = nn.Parameter(torch.full((spec.heads,), math.log(0.1 / 0.9)))

    @property
    def omega(self) -> Tensor:  # type: ignore[override]
        return torch.nn.functional.logsigmoid(self.g)

    def prepare(self, inputs: list[Tensor], target: Tensor) -> None:
        """Gradients alone."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["fit", "recall", "distill"], help="this part, again")
    parser.add_argument("--table", action="store_true", help="only write the page and the plots")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    known: dict[str, Any] = json.loads(FIGURES.read_text()) if FIGURES.is_file() else {}
    if arguments.only:
        known.pop(arguments.only, None)
    if not arguments.table:
        bench = Bench()
        for part in ("fit", "recall", "distill"):
            getattr(bench, part)(
                known.setdefault(part, {}), lambda: FIGURES.write_text(json.dumps(known, indent=1) + "\n")
            )
    write_page(known)


class Bench:
    """The source, the tokens to fit on and the held-out data, made once."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = linearize.demo_model_dir()
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.program = linearize.capture(self.model)
        self.teacher = run_pipeline(self.program, [RaiseAttention()])
        self.samples = split_rows(sample_teacher(self.teacher, TOKENS, LENGTH, 0, Progress(True)), 4)
        self.text = [*text_rows(self.tokenizer, held_out_documents(), TEXT_ROWS, LENGTH).split(4)]
        self.near = recall_batches(len(self.tokenizer), WINDOW, 4, seed=1)
        self.rows = [self.text[0], self.near[0].input_ids[:4], self.near[2].input_ids[:4]]
        self.far = far_recall(len(self.tokenizer), seed=2)

    def compiled(self, recipe: str, distill: Distill | None = None, **fit: Any) -> tuple[Any, float]:
        """(the model, CPU seconds)."""
        policy = Recipe.load(recipe)
        changes = {"fit": Fit(**{**policy.fit.model_dump(), "tokens": TOKENS, **fit}), "distill": distill or Distill()}
        started = time.process_time()
        model = linearize.compile(
            self.program, policy.model_copy(update=changes), calibration=self.samples, progress=True
        )
        return model, time.process_time() - started

    def quality(self, model: Any, seconds: float) -> dict[str, Any]:
        errors = site_errors(self.teacher, mixers_of(model.source), self.rows)
        student = logits_of(model)
        return {
            "mse": sum(errors.values()) / len(errors), "mse_by_site": list(errors.values()),
            "own_mse": model.report.mean_error(), "perplexity": perplexity(student, self.text),
            "kl": agreement(logits_of(self.model), student, self.text).kl,
            "recall": overall(recall(student, self.near, recall_edges(WINDOW))),
            "state": model.state_bytes(), "seconds": seconds,
        }  # fmt: skip

    # ---- fit -----------------------------------------------------------------------------------------------------

    def fit(self, known: dict[str, Any], save: Callable[[], object]) -> None:
        plain = {"passes": 0}
        rows: dict[str, tuple[str, dict[str, Any]]] = {
            "window of the same bytes": ("window{window=66}", plain),
            f"window of {WINDOW}": (f"window{{window={WINDOW}}}", plain),
            "slots, nothing fitted": ("slots{window=16,slots=32,decay=0.97}", plain),
            "lolcats, closed form": (f"lolcats{{{SMALL}}}", plain),
            "lolcats with maps, closed form": (f"lolcats{{{SMALL},maps=true}}", plain),
            "lolcats, closed form, then 1 pass": (f"lolcats{{{SMALL}}}", {"passes": 1, "learning_rate": 0.03}),
            f"lolcats, closed form, then {EPOCHS} passes": (
                f"lolcats{{{SMALL}}}", {"passes": EPOCHS, "learning_rate": 0.03}),
            "lolcats, closed form, then 1 pass at rate 0.1": (
                f"lolcats{{{SMALL}}}", {"passes": 1, "learning_rate": 0.1}),
            f"lolcats, closed form, then {EPOCHS} passes at rate 0.1": (
                f"lolcats{{{SMALL}}}", {"passes": EPOCHS, "learning_rate": 0.1}),
            "lizard with maps, closed form": (f"lizard{{window={WINDOW},maps=true}}", plain),
            "gla with maps, closed form": (f"gla{{window={WINDOW},maps=true}}", plain),
        }  # fmt: skip
        for rate in RATES:
            name = f"LoLCATs by gradients alone, {EPOCHS} passes, rate {rate:g}"
            rows[name] = (f"{PAPER}{{window={WINDOW}}}", {"passes": EPOCHS, "learning_rate": rate})
        if "source" not in known:
            known["source"] = {"perplexity": perplexity(logits_of(self.model), self.text)}
        for name, (recipe, fit) in rows.items():
            if name not in known:
                known[name] = self.quality(*self.compiled(recipe, **fit))
                tell(name, known[name])
                save()

    # ---- recall --------------------------------------------------------------------------------------------------

    def recall(self, known: dict[str, Any], save: Callable[[], object]) -> None:
        fitted = {"passes": 1, "learning_rate": 0.03}
        rows: dict[str, tuple[str, dict[str, Any]]] = {
            "hybrid": ("hybrid{window=32}", fitted),
            **{f"slots {n}": (f"slots{{window=16,slots={n},decay=0.97}}", {"passes": 0}) for n in (32, 96, 224, 480)},
            **{f"window {n}": (f"window{{window={n}}}", {"passes": 0}) for n in (66, 130, 258, 514)},
            **{f"hedgehog {n}": (f"lolcats{{window=32,features={n},sinks=0}}", fitted) for n in (32, 94, 218, 466)},
        }
        if "source" not in known:
            known["source"] = {"by_distance": self.by_distance(self.model)}
            save()
        for name, (recipe, fit) in rows.items():
            if name not in known:
                model, _ = self.compiled(recipe, **fit)
                state = model.state_bytes(context=0), model.state_bytes(context=CONTEXT)
                known[name] = {"by_distance": self.by_distance(model), "state": state}
                print(name, known[name], flush=True)
                save()

    def by_distance(self, model: nn.Module) -> dict[str, float]:
        found = recall(logits_of(model), self.far, EDGES)
        return {f"{row.low}-{row.high}": row.accuracy for row in found}

    # ---- end to end ----------------------------------------------------------------------------------------------

    def distill(self, known: dict[str, Any], save: Callable[[], object]) -> None:
        recipes = {"lizard": "lizard{window=32,maps=true}", "slots": "slots{window=16,slots=32,decay=0.97}"}
        for name, recipe in recipes.items():
            for tokens in (0, 131_072):
                row = f"{name}, {tokens:,} tokens"
                if row not in known:
                    how = Distill(tokens=tokens, lengths=(LENGTH,))
                    model, seconds = self.compiled(recipe, how, passes=0)
                    known[row] = self.quality(model, seconds)
                    whole = model.report.end_to_end
                    known[row]["held_out"] = None if whole is None else [whole.kl_start, whole.kl_end]
                    tell(row, known[row])
                    save()


def far_recall(vocabulary: int, seed: int) -> list[RecallBatch]:
    """Segments of 32 tokens that come again behind filler, one batch a range of EDGES, rows of 2,048 tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [
        repeated_segments(
            RECALL_ROWS, CONTEXT, segment=(SEGMENT, SEGMENT), gap=(low - SEGMENT, high - 1 - SEGMENT),
            token_range=(16, vocabulary), generator=generator,
        )
        for low, high in pairwise(EDGES)
    ]  # fmt: skip


def tell(name: str, row: dict[str, Any]) -> None:
    figures = f"mse {row['mse']:.4f}, perplexity {row['perplexity']:.2f}, recall {row['recall']:.1%}"
    print(f"{name}: {figures}, {row['seconds']:.0f} s", flush=True)


# ---- the page --------------------------------------------------------------------------------------------------------


def write_page(known: dict[str, Any]) -> None:
    figures = [table(known[part]) for part, table in TABLES.items() if known.get(part)]
    console = Console(width=160)
    for figure in figures:
        console.print(figure.drawn())
    if known.get("recall"):
        PLOT.write_text(plot(known["recall"]))
    PAGE.write_text(HEAD + "\n\n".join(figure.markdown() for figure in figures) + NOTES + reading(known))


def reading(known: dict[str, Any]) -> str:
    """What the tables say, in words made from the same numbers."""
    lines = ["", "## Reading", ""]
    fit = known.get("fit", {})
    alone = {name: row for name, row in fit.items() if name.startswith("LoLCATs")}
    if alone and "slots, nothing fitted" in fit:
        best = min(alone.values(), key=lambda row: row["mse"])
        searched = sum(row["seconds"] for row in alone.values())
        half = fit[f"window of {WINDOW}"]["mse"] / 2
        lines.append(
            f"- The best run by gradients alone reaches MSE {best['mse']:.4f} and perplexity "
            f"{best['perplexity']:.2f} in {best['seconds']:.0f} s, {searched:.0f} s with the search of its rate "
            f"({len(alone)} rates). Half of the window's MSE is {half:.4f}."
        )
        window, slots = fit["window of the same bytes"], fit["slots, nothing fitted"]
        lines.append(
            f"- A plain window of as many bytes has perplexity {window['perplexity']:.2f} where slots have "
            f"{slots['perplexity']:.2f}, and MSE {window['mse']:.4f} where they have {slots['mse']:.4f}: at this size "
            "most of what text asks for is near."
        )
        ours = [name for name in fit if name.startswith(("slots", "lolcats"))]
        lines += [_against(name, fit[name], best, searched, half) for name in ours]
    ranges = known.get("recall", {})
    if "hybrid" in ranges:
        pairs = [(part, ranges["hybrid"]["by_distance"][part], value)
                 for part, value in ranges["source"]["by_distance"].items()]  # fmt: skip
        held = [f"{part}: {ours / theirs:.0%}" for part, ours, theirs in pairs if theirs > 0.1]
        lost = [f"{part} (its own recall: {theirs:.1%})" for part, _, theirs in pairs if theirs <= 0.1]
        lines.append(f"- Of the source's recall the hybrid (a quarter of the layers kept) has {', '.join(held)}.")
        if lost:
            lines.append(f"- The source itself does not recall at {', '.join(lost)}: there is nothing to recover.")
    return "\n".join([*lines, ""])


def _against(name: str, row: dict[str, Any], best: dict[str, Any], searched: float, half: float) -> str:
    closer = "closer" if row["mse"] <= best["mse"] else "not as close"
    reads = "no worse" if row["perplexity"] <= best["perplexity"] else "worse"
    under = "under" if row["mse"] < half else "not under"
    return (
        f"- {name}: {closer} ({row['mse']:.4f}), perplexity {reads} ({row['perplexity']:.2f}), in "
        f"{row['seconds']:.0f} s: {row['seconds'] / best['seconds']:.0%} of that one run, "
        f"{row['seconds'] / searched:.0%} of the search; {under} half of the window's MSE."
    )


def fit_table(known: dict[str, Any]) -> Figure:
    rows = [
        (name, f"{row['mse']:.4f}", f"{row['perplexity']:.2f}", f"{row['kl']:.3f}", f"{row['recall']:.1%}",
         bytes_text(row["state"]), f"{row['seconds']:.0f}")
        for name, row in sorted(known.items(), key=lambda item: item[1].get("mse", 0)) if "mse" in row
    ]  # fmt: skip
    title = f"fits on {TOKENS:,} tokens; the source's perplexity is {known['source']['perplexity']:.2f}"
    headers = ("fit", "MSE", "perplexity", "KL", "recall 33-400", "state", "CPU seconds")
    return Figure(title, headers, rows, words=("fit",))


def recall_table(known: dict[str, Any]) -> Figure:
    ranges = list(known["source"]["by_distance"])
    rows = [
        (name, *(f"{row['by_distance'][part]:.1%}" for part in ranges), _carried(row)) for name, row in known.items()
    ]
    if "hybrid" in known:
        ratios = (known["hybrid"]["by_distance"][part] / known["source"]["by_distance"][part] for part in ranges)
        rows.append(("hybrid / source", *(f"{ratio:.1%}" for ratio in ratios), ""))
    headers = ("model", *ranges, f"state at {CONTEXT}")
    return Figure("recall by how far back the answer stands, in tokens", headers, rows, words=("model",))


def _carried(row: dict[str, Any]) -> str:
    return bytes_text(row["state"][1]) if "state" in row else "grows"


def distill_table(known: dict[str, Any]) -> Figure:
    rows = [
        (name, f"{row['perplexity']:.2f}", f"{row['kl']:.3f}", f"{row['recall']:.1%}",
         "-" if row["held_out"] is None else "{:.3f} -> {:.3f}".format(*row["held_out"]), f"{row['seconds']:.0f}")
        for name, row in known.items()
    ]  # fmt: skip
    headers = ("model", "perplexity", "KL on text", "recall 33-400", "KL held out of the samples", "CPU seconds")
    return Figure("the end-to-end stage, after the closed form", headers, rows, words=("model",))


TABLES: dict[str, Callable[[dict[str, Any]], Figure]] = {
    "fit": fit_table, "recall": recall_table, "distill": distill_table,
}  # fmt: skip


def plot(known: dict[str, Any]) -> str:
    """Mean recall over all distances against state bytes, one line a kind."""
    lines = []
    for kind in ("slots", "hedgehog", "window"):
        rows = [row for name, row in known.items() if name.startswith(kind)]
        points = sorted((row["state"][1], 100 * _mean(row)) for row in rows)
        if points:
            lines.append(Line(kind, tuple(points)))
    drawn = line_plot(lines, "recall at 33 to 2,000 tokens, %", "bytes of state", log_y=False, base=2)
    return drawn.replace("<svg ", '<svg style="color:#111;background:#fff" ', 1)


def _mean(row: dict[str, Any]) -> float:
    values = list(row["by_distance"].values())
    return sum(values) / len(values)


HEAD = """# Calibration, measured

Written by `python benchmarks/bench_calibration.py` on the embedded model (torch on CPU, one thread); the numbers are in
`calibration_figures.json`. What each row is stands in that script.

"""
NOTES = """

MSE is the mean over sites of the relative error of the attention's output, each mixer fed the source's own inputs, on
held-out text and recall sequences. Perplexity and KL are on held-out text of 512 tokens a row. State: one sequence's.
Hedgehog rows of the second table are `lolcats` in closed form and after 1 pass, with features for the bytes of the row.
Fitting by gradients alone takes the seconds of its row for every learning rate that is tried.

![recall against state bytes](calibration-recall.svg)
"""


if __name__ == "__main__":
    assert issubclass(PaperLolcats, Mixer)
    main()
