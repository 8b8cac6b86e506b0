"""docs/planner-figures.md and a curve for each model, from what bench_planner.py measured."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from linearize.planner.pareto import Mark, drawn
from linearize.printing import Figure, bytes_text

NAMES = {
    "demo": "the embedded model (Llama, 4 layers, 6 heads on 2 kv heads of 32)",
    "qwen3": "a Qwen3 of 4 layers, 6 heads on 3 kv heads of 16, norms of q and k, trained by the script",
    "neox": "a GPT-NeoX of 4 layers, 6 heads of 16, half of each rotated, MLP beside attention, trained by the script",
    "gpt2": "a GPT-2 of 3 layers, 4 heads of 24, learned positions, trained by the script",
}


def write_page(known: dict[str, Any], folder: Path) -> None:
    parts = [HEAD.format(context=f"{known.get('context', 4096):,}", torch=known.get("torch", ""))]
    for name, found in known["models"].items():
        file = folder / f"planner-figures-{name}.svg"
        marks = [Mark(f"{row['budget']:.0%}", row["bytes"], row["loss"]) for row in found["budgets"]]
        others = [Mark(key, row["bytes"], row["loss"]) for key, row in found["recipes"].items()]
        file.write_text(drawn(marks, others, found["source_bytes"], f"{name}: loss by state") + "\n")
        parts += [model_page(name, found, file.name)]
        parts += [long_page(known["long"])] if name == "demo" and known.get("long") else []
    if known.get("speed"):
        parts += [speed_page(known["speed"])]
    (folder / "planner-figures.md").write_text("\n\n".join(parts) + "\n")


def model_page(name: str, found: dict[str, Any], picture: str) -> str:
    rivals = list(dict.fromkeys(key for row in found["budgets"] for key in row["rivals"]))
    lines = []
    for row in found["budgets"]:
        cells = [figure(row["rivals"][key]["loss"]) if key in row["rivals"] else "-" for key in rivals]
        recipe = best_recipe(found, row)
        shown = f"{recipe} {figure(found['recipes'][recipe]['loss'])}" if recipe else "-"
        told = (f"{row['budget']:.0%}", bytes_text(row["bytes"]), figure(row["predicted"]), figure(row["loss"]))
        lines.append((*told, *cells, shown, verdict(row, found)))
    heads = ("budget", "bytes", "predicted", "plan", *rivals, "best recipe that fits", "")
    table = Figure("KL from the source in nats a token, on held-out rows", heads, lines,
                   words=("best recipe that fits", ""))  # fmt: skip
    single = [one for one in found["single"] if one["loss"] > 0]
    estimate = spearman([one["fisher"] for one in single], [one["loss"] for one in single])
    return f"""## {NAMES[name][0].upper()}{NAMES[name][1:]}

{table.markdown()}

![Loss by state]({picture})

Rows of {found["length"]} tokens, {found["test_tokens"]:,} tokens in all; 100 % is {bytes_text(found["source_bytes"])}.
Predicted loss ranks random plans like measured loss, Spearman: {"; ".join(map(ranks, found["random"].values()))}.
The estimate from gradients ranks {len(single)} single replacements like the model's own loss: {estimate:.3f}.
Scores took {found["seconds_scoring"]:.0f} s of CPU time (one thread), a budget with its measurements
{statistics.median(row["seconds"] for row in found["budgets"]):.0f} s."""


def ranks(plans: Sequence[dict[str, Any]]) -> str:
    """Half the plans have one mixer a site, the others one a kv head (bench_planner.py)."""
    kinds = (slice(None), slice(0, None, 2), slice(1, None, 2))
    rank, whole, heads = (ranked(plans[part]) for part in kinds)
    return f"{rank:.3f} over {len(plans)} ({whole:.3f} with one mixer a site, {heads:.3f} with heads that differ)"


def long_page(rows: list[dict[str, Any]]) -> str:
    keys = ("predicted", "scaled", "first", "context")
    lines = [(f"{row['budget']:.0%}", *(figure(row[key]) for key in keys)) for row in rows]
    positions = f"{rows[0]['positions']:,}"
    scored = f"{rows[0].get('scored', 1024):,}"
    heads = ("budget", "predicted", f"{positions}, same number a token", f"{positions}", "4,096")
    table = Figure("The same plans on longer rows, KL by the length of the rows", heads, lines)
    return f"""{table.markdown()}

On {rows[0]["rows"]} rows. Predictions are from rows of {scored} tokens, with slots and long windows at the same
number per token as at 4,096; then as many per token on rows of {positions}, its `max_position_embeddings`; the same
rows with the sizes that the plan says, which are meant for 4,096; and rows of 4,096. Predictions do not carry over to
rows longer than those that scores were measured on: give `--data` and `--length` as long as the text that the model
will read."""


def best_recipe(found: dict[str, Any], row: dict[str, Any]) -> str | None:
    limit = row["budget"] * found["source_bytes"]
    fitting = {key: one["loss"] for key, one in found["recipes"].items() if one["bytes"] <= limit}
    return min(fitting, key=lambda key: fitting[key]) if fitting else None


def verdict(row: dict[str, Any], found: dict[str, Any]) -> str:
    """`best`, `tie` where a rival's mean is lower by less than twice the standard error of the rows' differences, or
    the name of the rival that is better."""
    others = {key: one["rows"] for key, one in row["rivals"].items()}
    limit = row["budget"] * found["source_bytes"]
    others |= {f"recipe {key}": one["rows"] for key, one in found["recipes"].items() if one["bytes"] <= limit}
    told = "best"
    for name, rows in others.items():
        differences = [own - other for own, other in zip(row["rows"], rows, strict=True)]
        mean = statistics.fmean(differences)
        if mean <= 1e-9:
            continue
        noise = statistics.stdev(differences) / len(differences) ** 0.5
        if mean > 2 * noise:
            return f"{name} is better"
        told = f"tie with {name}"
    return told


def speed_page(found: dict[str, Any]) -> str:
    rows = [
        (row["model"], f"{row['context']:,}", f"{1e3 * row['measured']:.2f}", f"{1e3 * row['predicted']:.2f}",
         f"{row['predicted'] / row['measured']:.2f}")
        for row in found["decoding"]
    ]  # fmt: skip
    table = Figure("Milliseconds a decoded token on this CPU, one thread", ("model", "context", "measured", "predicted",
                   "ratio"), rows, words=("model",))  # fmt: skip
    plan = found["planning"]
    timed = f"{table.markdown()}\n\nThe target `cpu` was timed just before. " if rows else ""
    return f"""## Decode time, and the time to plan

{timed}A model of {plan["layers"]} layers, {plan["heads"]} kv heads and {plan["candidates"]} candidates (and the sizes
between them) is planned from scores in {plan["frontiers"]:.2f} s of CPU time for what its layers can be, with the exact
bytes of every choice, and {plan["ten budgets"]:.2f} s for ten budgets with the plans near their solutions."""


def figure(value: float) -> str:
    return "0" if value < 5e-7 else f"{value:.2g}" if value < 0.1 else f"{value:.2f}"


def ranked(plans: Sequence[dict[str, Any]]) -> float:
    return spearman([one["predicted"] for one in plans], [one["loss"] for one in plans])


def spearman(one: Sequence[float], other: Sequence[float]) -> float:
    """Rank correlation."""
    def ranks(values: Sequence[float]) -> list[int]:
        order = sorted(range(len(values)), key=lambda at: values[at])
        found = [0] * len(values)
        for rank, at in enumerate(order):
            found[at] = rank
        return found

    count = len(one)
    squares = sum((a - b) ** 2 for a, b in zip(ranks(one), ranks(other), strict=True))
    return 1 - 6 * squares / (count * (count**2 - 1))


HEAD = """# The planner, measured

Written by `python benchmarks/bench_planner.py` (torch {torch}, one thread). [Planning](planning.md) says what it does.

At every budget, a share of what the source carries at {context} tokens of context: the plan, one mixer in every layer
as large as the budget allows (windows, slots, LoLCATs, moments, latent attention), LLM-Drop with as few attentions
deleted as the budget needs, and the built-in recipes at their own bytes. Mixers that learn are prepared in all of
them, in closed form where they have one, without gradients. The evicting caches, windows by head and shared caches
are candidates of the embedded model's plans alone. Losses are measured on rows shorter than the context, with
slots, caches of evicting mixers and windows above 128 keys at the same number per token as at {context}; rows that
plans were not chosen on. The planner's sizes of slots end at half of the context and those of latent caches at half of
the source's, so from 60 % on a uniform mixer that is larger can lose less: so on the GPT-NeoX, both less than a
millionth of a nat. The models that the script trains see 330,000 tokens: they attend as small models do, and
lose little when they do not."""
