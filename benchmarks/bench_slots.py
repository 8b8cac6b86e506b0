"""Merged slots on the embedded model: against a fitted LoLCATs, eviction (H2O) and StreamingLLM at the same state.

    python benchmarks/bench_slots.py --quick                         # fewer rows, no fit, contexts to 4k
    python benchmarks/bench_slots.py --json docs/slots.json          # what docs/slots.md reports

Nothing but LoLCATs is fitted. Relative MSE is mean (y' - y)^2 / var(y) of each attention on the source's own inputs.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer

import linearize
from linearize.calibration import demo, evaluate
from linearize.calibration.teacher import TeacherStream
from linearize.capture import capture
from linearize.mixers import build_mixer
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.program import Program
from linearize.spec import AttentionSpec, MaskSpec

WINDOW, SINKS = 32, 4
LOLCATS = f"lolcats{{window={WINDOW},features=128,sinks={SINKS}}}"
SAME_TOKENS = 164 + SINKS  # keys and values of as many tokens take the bytes of LOLCATS: 84 KiB a layer
BY_LAYER = (24, 256, 96, 32)  # 408 slots, as 4 x 102: least mean error on the model's own samples over a grid of sizes
DECAYS = (0.97, 0.93)
SLOTS = {
    "slots 16": {"slots": 16},
    "slots 64": {"slots": 64},
    "slots 102, same bytes": {"slots": 102},
    "slots 128": {"slots": 128},
    "slots 102, 1 round": {"slots": 102, "rounds": 1},
    "slots 134 in blocks of 16, same bytes": {"slots": 134, "window": 16},
}
PARTS = ("models", "positions", "prefill")
EDGES = (0, 512, 1024, 2048, 4096, 8192, 16384)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rows, no fit, contexts to 4k")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="the others stay as the file has them")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.quick)
    measures = {"models": bench.models, "positions": bench.positions, "prefill": lambda: prefill(arguments.quick)}
    tables = {"models": model_table, "positions": position_table, "prefill": prefill_table}
    figures: dict[str, Any] = {"torch": torch.__version__, "quick": arguments.quick}
    if arguments.json and arguments.json.exists():
        figures = {**json.loads(arguments.json.read_text()), **figures}
    for part in arguments.parts:
        figures[part] = measures[part]()
        Console(width=160).print(tables[part](figures[part]))
        if arguments.json:
            arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


class Bench:
    def __init__(self, quick: bool) -> None:
        folder = linearize.demo_model_dir()
        self.quick, self.source = quick, AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.captured = capture(self.source)
        self.teacher: Program = run_pipeline(self.captured, [RaiseAttention()])
        count = 4 if quick else 16
        self.text = demo.text_rows(self.tokenizer, demo.held_out_documents(), count, 512)
        self.recall = demo.recall_batches(1024, WINDOW, 4 if quick else 16, seed=1)
        self.sites = [self.text[: count // 2], self.recall[1].input_ids[: count // 2]]

    def models(self) -> list[dict[str, Any]]:
        """A row for every model: state bytes, error of each site, perplexity, recall by distance."""
        rows = [self.measured("source", self.source, 0, {})]
        evicting = [evict_errors(self.teacher, self.sites, SAME_TOKENS)]
        AttentionInterface.register("evicting", evicting_attention)
        self.source.config._attn_implementation = "evicting"
        token = 2 * 2 * 32 * 4 * 4  # bytes of a token's keys and values
        rows.append(self.measured("H2O, same bytes", self.source, SAME_TOKENS * token, evicting[0]))
        self.source.config._attn_implementation = "sdpa"
        for name, model in self.compiled().items():
            errors = evaluate.site_errors(self.teacher, evaluate.mixers_of(model.source), self.sites)
            rows.append(self.measured(name, model, model.state_bytes(1), errors))
        return rows

    def compiled(self) -> dict[str, Any]:
        recipes = {
            "window 32 + 4 sinks": f"window{{window={WINDOW},sinks={SINKS}}}",
            "StreamingLLM, same bytes": f"window{{window={SAME_TOKENS - SINKS},sinks={SINKS}}}",
        }
        models = {name: linearize.compile(self.captured, recipe, progress=False) for name, recipe in recipes.items()}
        for name, options in SLOTS.items():
            models[name] = self.slots([{"window": WINDOW, **options}] * 4)
        models |= {f"{name}, same bytes": model for name, model in self.by_layer().items()}
        if not self.quick:
            models["LoLCATs fitted on 131k tokens"] = linearize.compile(self.captured, LOLCATS, progress=False)
        return models

    def by_layer(self) -> dict[str, Any]:
        name = f"slots {'/'.join(map(str, BY_LAYER))}"
        options = [{"window": WINDOW, "slots": count} for count in BY_LAYER]
        aged = {f"{name}, decay {d}": self.slots([{**one, "decay": d} for one in options]) for d in DECAYS}
        return {name: self.slots(options), **aged}

    def slots(self, options: list[dict[str, Any]]) -> Any:
        entries = tuple(
            PlanEntry(site=site.index, module=site.module, mixer="slots", options=chosen)
            for site, chosen in zip(self.teacher.matched, options, strict=True)
        )
        plan = Plan(recipe="slots", entries=entries)
        return linearize.compile(self.captured, "slots", plan=plan, tokens=0, progress=False)

    def measured(self, name: str, model: Any, state: int, errors: dict[int, float]) -> dict[str, Any]:
        started = time.perf_counter()
        logits = evaluate.logits_of(model)
        table = evaluate.recall(logits, self.recall, demo.recall_edges(WINDOW))
        row = {
            "model": name,
            "state_bytes": state,
            "relative_mse": [errors[site] for site in sorted(errors)],
            "perplexity": evaluate.perplexity(logits, self.text.split(4)),
            "recall": evaluate.overall(table),
            "recall_by_distance": {f"{row.low}-{row.high}": row.accuracy for row in table},
        }
        print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
        return row

    def positions(self) -> list[dict[str, Any]]:
        """Perplexity by position in one long row of held-out text."""
        length = 4096 if self.quick else EDGES[-1]
        row = demo.text_rows(self.tokenizer, demo.held_out_documents(), 1, length)
        models = {
            "source": self.source,
            "StreamingLLM, same bytes": linearize.compile(
                self.captured, f"window{{window={SAME_TOKENS - SINKS},sinks={SINKS}}}", progress=False
            ),
            "slots 102": self.slots([{"window": WINDOW, "slots": 102}] * 4),
            **self.by_layer(),
        }
        return [{"model": name, **by_position(evaluate.logits_of(model), row)} for name, model in models.items()]


@torch.no_grad()
def by_position(logits: Callable[[Tensor], Tensor], row: Tensor) -> dict[str, float]:
    losses = torch.nn.functional.cross_entropy(logits(row)[0, :-1].float(), row[0, 1:], reduction="none").double()
    edges = [edge for edge in EDGES if edge <= row.shape[1]]
    return {f"{a}-{b}": losses[a:b].mean().exp().item() for a, b in pairwise(edges)}


# ---- eviction by accumulated attention (H2O, Zhang et al. 2023) ------------------------------------------------------


@torch.no_grad()
def evict(q: Tensor, k: Tensor, v: Tensor, scale: float, budget: int) -> Tensor:
    """q [B,H,T,d], k, v [B,G,T,d]: each kv head keeps `budget` tokens, the newer half by age, the others by the
    attention that they have received from the head's queries so far; [B,H,T,dv]."""
    batch, heads, length, _ = q.shape
    group = heads // k.shape[1]
    scores = scale * q.unflatten(1, (k.shape[1], group)) @ k[:, :, None].mT
    kept = torch.zeros(batch, k.shape[1], length, dtype=torch.bool)
    received = torch.zeros(batch, k.shape[1], length)
    outputs = []
    for t in range(length):
        kept[..., t] = True
        if t >= budget:
            old = received.masked_fill(~kept, float("inf"))
            old[..., t - budget // 2 + 1 :] = float("inf")
            kept.scatter_(2, old.argmin(-1, keepdim=True), False)
        weights = torch.softmax(scores[:, :, :, t].masked_fill(~kept[:, :, None], float("-inf")), dim=-1)
        received += weights.sum(2)
        outputs.append(weights @ v)
    return torch.stack(outputs, dim=3).flatten(1, 2)


def evicting_attention(module: Any, query: Tensor, key: Tensor, value: Tensor, *_: Any, **options: Any) -> Any:
    return evict(query, key, value, options["scaling"], SAME_TOKENS).transpose(1, 2), None


def evict_errors(teacher: Program, rows: list[Tensor], budget: int) -> dict[int, float]:
    stream, errors = TeacherStream(teacher, rows), {}
    with torch.no_grad():
        for site in stream.walk(teacher.matched):
            pairs = []
            for batch in range(len(rows)):
                (q, k, v), y = stream.site_values(site, (), batch)
                pairs.append((evict(q, k, v, site.attention.scale, budget), y))
            found, expected = (torch.cat(part) for part in zip(*pairs, strict=True))
            errors[site.index] = ((found - expected).square().mean() / expected.var()).item()
    return errors


# ---- speed -----------------------------------------------------------------------------------------------------------

SHAPES = ((6, 2, 32, 32, 64), (6, 2, 32, 32, 128), (8, 8, 64, 64, 64), (8, 2, 64, 64, 64))


def prefill(quick: bool) -> list[dict[str, Any]]:
    """Thread CPU time of one mixer over 16k tokens, the best of three rounds in turn, over the plain window's."""
    length, rows = 4096 if quick else 16384, []
    for heads, kv_heads, dim, window, count in SHAPES:
        spec = AttentionSpec(heads, kv_heads, dim, dim, heads * dim, dim**-0.5, MaskSpec("causal"))
        inputs = [torch.randn(1, n, length, dim) for n in (heads, kv_heads, kv_heads)]
        mixers = {
            "window": build_mixer("window", spec, {"window": window}),
            "slots": build_mixer("slots", spec, {"window": window, "slots": count}),
            "slots, 1 round": build_mixer("slots", spec, {"window": window, "slots": count, "rounds": 1}),
        }
        best = dict.fromkeys(mixers, float("inf"))
        with torch.no_grad():
            for _ in range(3):
                for name, mixer in mixers.items():
                    started = time.thread_time()
                    mixer.run(inputs)
                    best[name] = min(best[name], time.thread_time() - started)
        shape = {"heads": heads, "kv_heads": kv_heads, "dim": dim, "window": window, "slots": count, "length": length}
        rows.append({**shape, "ms": {name: 1e3 * seconds for name, seconds in best.items()}})
    return rows


# ---- tables ----------------------------------------------------------------------------------------------------------


def model_table(rows: list[dict[str, Any]]) -> Table:
    ranges = list(rows[0]["recall_by_distance"])
    table = Table("model", "KiB", "MSE by layer", "mean", "perplexity", "recall", *ranges)
    for row in rows:
        errors = row["relative_mse"]
        table.add_row(
            row["model"], f"{row['state_bytes'] / 1024:.0f}", " ".join(f"{e:.4f}" for e in errors),
            f"{sum(errors) / len(errors):.4f}" if errors else "", f"{row['perplexity']:.2f}", f"{row['recall']:.1%}",
            *(f"{row['recall_by_distance'][name]:.1%}" for name in ranges),
        )  # fmt: skip
    return table


def position_table(rows: list[dict[str, Any]]) -> Table:
    table = Table(*rows[0])
    for row in rows:
        table.add_row(*(value if isinstance(value, str) else f"{value:.2f}" for value in row.values()))
    return table


def prefill_table(rows: list[dict[str, Any]]) -> Table:
    table = Table("heads", "kv", "dim", "block", "slots", "window ms", "slots ms", "ratio", "1 round")
    for row in rows:
        ms = row["ms"]
        ratios = [f"{ms[name] / ms['window']:.2f}" for name in ("slots", "slots, 1 round")]
        shape = [str(row[name]) for name in ("heads", "kv_heads", "dim", "window", "slots")]
        table.add_row(*shape, f"{ms['window']:.0f}", f"{ms['slots']:.0f}", *ratios)
    return table


if __name__ == "__main__":
    main()
