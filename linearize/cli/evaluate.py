"""`linearize eval`: what a conversion lost, on text and on recall, beside the model it was made from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearize.cli._mixers import Mixers
from linearize.cli._models import MODEL_HELP, context_limit, load_source, locate
from linearize.cli._shell import out
from linearize.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from linearize.calibration.evaluation import Suite
    from linearize.calibration.sources import Source
    from linearize.runtime.model import LinearizedModel

SITE_ROWS = 8
SEED = 1
TASK_BATCH = 4


def evaluate(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What linearize compile wrote.", show_default=False)
    ],
    against: Annotated[
        str, typer.Option("--against", metavar="MODEL", help=f"The model it was made from: {MODEL_HELP}")
    ],
    data: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Text file, JSON lines or folder: a shard of its own; may be repeated. Without one: standard library.",
        ),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="Rows of text a shard, and of recall a kind.")] = 16,
    length: Annotated[int, typer.Option(min=16, help="Tokens a row.")] = 512,
    far: Annotated[
        int, typer.Option(min=0, help="Recall in rows of so many tokens too, far beyond --length. 0 for none.")
    ] = 2048,
    sites: Annotated[bool, typer.Option(help="Measure every site too.")] = True,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures to this file.")
    ] = None,
    task: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK", help="Also a task of lm-evaluation-harness (linearize[eval]); may be repeated."),
    ] = None,
    task_folder: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="YAML files of tasks of your own.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Examples of a task; all without.")] = None,
    plots: Annotated[
        Path | None, typer.Option(metavar="FILE.svg", help="Also draw recall by distance and perplexity by position.")
    ] = None,
    mixers: Mixers = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Measure a compiled model against its source.

    Perplexity by position and by shard, divergence and agreement, recall by distance beyond the window, and the error
    of every layer with and without its far field.
    """
    from linearize.calibration.sources import parse_source

    sources = [parse_source(text) for text in data or []]
    import linearize
    from linearize.calibration.evaluation import evaluate_pair, evaluate_sites, warnings_of
    from linearize.progress import Progress

    compiled = linearize.load(directory)
    source = load_source(against)
    check_pair(compiled, source, directory, against)
    suite = made_suite(compiled, source, directory, against, sources, rows, (length, far))
    figures: dict[str, Any] = {"source": against, "compiled": directory.name, "length": length}
    figures["models"] = evaluate_pair(source, compiled, suite, Progress(not quiet))
    figures["models"]["compiled"]["state_bytes"] = compiled.state_bytes()
    figures["sites"] = []
    if sites:
        text = next(iter(suite.shards.values()))
        figures["sites"] = evaluate_sites(teacher_of(source), compiled.source, compiled.plan, first_rows(text))
    figures["warnings"] = warnings_of(figures["sites"])
    if task:
        figures["tasks"] = run_tasks(compiled, source, (directory, against), task, task_folder, limit)
    if json_file is not None:
        from linearize.files import write_atomically

        write_atomically(json_file, (json.dumps(figures, indent=1) + "\n").encode())
    if plots is not None:
        from linearize.files import write_atomically

        write_atomically(plots, drawn(figures["models"]).encode())
    show(figures)


def check_pair(compiled: LinearizedModel, source: nn.Module, directory: Path, name: str) -> None:
    """The two read the same tokens.

    Raises:
        ArtifactError: they do not, so one was not made from the other.
    """
    config: Any = getattr(source, "config", None)
    theirs, ours = getattr(config, "vocab_size", None), compiled.vocab_size
    if theirs is not None and ours is not None and theirs != ours:
        raise ArtifactError(f"{directory} reads {ours} tokens, {name} {theirs}: it was not compiled from that model")


def made_suite(
    compiled: LinearizedModel, source: nn.Module, directory: Path, name: str,
    sources: list[Source], rows: int, lengths: tuple[int, int],
) -> Suite:  # fmt: skip
    """Text by shard, cut to what the source can read, and recall beyond the widest window.

    Raises:
        DataError: no tokenizer is there to read text with, or the text is too short.
    """
    from linearize.calibration.evaluation import Suite, recall_suite
    from linearize.capture import hf

    limit = context_limit(source)
    length, far = (min(size, limit or size) for size in lengths)
    location = locate(name)
    tokenizer = hf.load_tokenizer(directory) or (hf.load_tokenizer(location) if location is not None else None)
    if tokenizer is None:
        raise DataError(f"neither {directory} nor {name} has a tokenizer to read text with")
    shards = read_shards(sources, tokenizer, rows, length)
    if compiled.vocab_size is None:
        return Suite(shards, {}, [])
    windows = [entry.options.get("window", 0) for entry in compiled.plan.entries]
    window = min(max([*windows, 8]), (length - 4) // 4)
    kinds, edges = recall_suite(
        compiled.vocab_size, window, length, max(1, rows // 2), SEED, tokenizer.bos_token_id or 0, far
    )
    return Suite(shards, kinds, edges)


def read_shards(sources: list[Source], tokenizer: Any, rows: int, length: int) -> dict[str, list[Tensor]]:
    from linearize.calibration.demo import held_out_documents, text_rows
    from linearize.calibration.sources import read_rows

    if sources:
        return {str(one.path): [read_rows(one, tokenizer, length, rows * length)[0]] for one in sources}
    if tokenizer.bos_token_id is None or tokenizer.eos_token_id is None:
        raise DataError("this tokenizer has no tokens for the begin and end of a text; give text with --data FILE")
    return {"standard library": [text_rows(tokenizer, held_out_documents(), rows, length)]}


def teacher_of(source: nn.Module) -> Any:
    import linearize
    from linearize.passes.rewrite import RaiseAttention
    from linearize.pipeline import run_pipeline

    return run_pipeline(linearize.capture(source), [RaiseAttention()])


def first_rows(text: list[Tensor]) -> list[Tensor]:
    import torch

    return list(torch.cat(text)[:SITE_ROWS].split(4))


def run_tasks(
    compiled: LinearizedModel, source: nn.Module, places: tuple[Path, str], tasks: list[str], folder: Path | None,
    limit: int | None,
) -> dict[str, Any]:  # fmt: skip
    from linearize.calibration.evaluate_tasks import task_scores
    from linearize.capture import hf

    location = locate(places[1])
    tokenizer = hf.load_tokenizer(places[0]) or (hf.load_tokenizer(location) if location is not None else None)
    models: dict[str, nn.Module] = {"source": source, "compiled": compiled.to_transformers()}
    return task_scores(models, tokenizer, tasks, folder, limit, TASK_BATCH)


# ---- tables ----------------------------------------------------------------------------------------------------------


def show(figures: dict[str, Any]) -> None:
    from linearize import printing

    models, console = figures["models"], out()
    console.print(models_figure(models).drawn())
    if models["source"]["recall_by_kind"]:
        console.print("")
        console.print(kinds_figure(models).drawn())
    console.print("")
    console.print(text_figure(models).drawn())
    if figures["sites"]:
        console.print("")
        console.print(sites_figure(figures["sites"]).drawn())
    if "tasks" in figures:
        console.print("")
        console.print(tasks_figure(figures["tasks"]).drawn())
    console.print(printing.notes(figures["warnings"]))


def models_figure(models: dict[str, Any]) -> Any:
    from linearize.printing import Figure, bytes_text

    ranges = [f"{row['low']}-{row['high']}" for row in models["source"]["recall_by_distance"]]
    rows = [
        (
            name, f"{row['perplexity']:.2f}", f"{row['kl']:.3f}" if "kl" in row else "",
            f"{row['top1']:.1%}" if "top1" in row else "", "-" if row["recall"] is None else f"{row['recall']:.1%}",
            *(f"{part['accuracy']:.1%}" for part in row["recall_by_distance"]),
            bytes_text(row["state_bytes"]) if "state_bytes" in row else "grows",
        )
        for name, row in models.items()
    ]  # fmt: skip
    headers = ("model", "perplexity", "KL", "top-1", "recall", *ranges, "state")
    return Figure("the whole model, recall by how far back the answer stands", headers, rows, words=("model",))


def kinds_figure(models: dict[str, Any]) -> Any:
    """Recall of each kind by distance, the source's and ours."""
    from linearize.printing import Figure

    ranges = [(row["low"], row["high"]) for row in models["source"]["recall_by_distance"]]
    rows = []
    for kind in models["source"]["recall_by_kind"]:
        for name, row in models.items():
            found = {(one["low"], one["high"]): f"{one['accuracy']:.1%}" for one in row["recall_by_kind"][kind]}
            rows.append((kind, name, *(found.get(bounds, "-") for bounds in ranges)))
    headers = ("recall", "model", *(f"{low}-{high}" for low, high in ranges))
    return Figure("recall by kind: copied segments, key-value pairs, a key in filler", headers, rows, words=headers[:2])


def drawn(models: dict[str, Any]) -> str:
    """Two plots in one SVG: recall by distance, and perplexity by position."""
    from linearize.svg import Line, beside, line_plot

    def series(part: str, value: str, scale: float) -> list[Line]:
        return [
            Line(name, [(float(one["high"]), scale * one[value]) for one in row[part]])
            for name, row in models.items() if row[part]
        ]  # fmt: skip

    recalled, text = series("recall_by_distance", "accuracy", 100.0), series("by_position", "perplexity", 1.0)
    made = [line_plot(recalled, "recall, %", "tokens back", log_y=False)] if recalled else []
    return beside([*made, line_plot(text, "perplexity", "position in the text")])


def text_figure(models: dict[str, Any]) -> Any:
    """Perplexity by position over all text, then of each shard where there are several."""
    from linearize.printing import Figure

    pair = models["source"], models["compiled"]
    rows = [
        (f"tokens {one['low']}-{one['high']}", f"{one['perplexity']:.2f}", f"{two['perplexity']:.2f}")
        for one, two in zip(*(model["by_position"] for model in pair), strict=True)
    ]
    shards = [pair[0]["shards"], pair[1]["shards"]]
    if len(shards[0]) > 1:
        rows += [(name, *(f"{shard[name]['perplexity']:.2f}" for shard in shards)) for name in shards[0]]
    return Figure("perplexity by position and by shard", ("text", "source", "compiled"), rows, words=("text",))


def sites_figure(sites: list[dict[str, Any]]) -> Any:
    from linearize.printing import Figure, figure

    rows = [
        (str(site["site"]), site["module"], site["mixer"],
         *(figure(site[key]) for key in ("error", "error_of_window", "error_without_window")))
        for site in sites
    ]  # fmt: skip
    headers = ("site", "module", "mixer", "error", "window alone", "far alone")
    return Figure("relative MSE of each attention's output", headers, rows, words=("module", "mixer"))


def tasks_figure(tasks: dict[str, Any]) -> Any:
    from linearize.printing import Figure

    rows = [
        (task, metric, f"{value:.4f}", f"{tasks['compiled'][task][metric]:.4f}")
        for task, found in tasks["source"].items() for metric, value in found.items()
    ]  # fmt: skip
    return Figure("tasks of lm-evaluation-harness", ("task", "metric", "source", "compiled"), rows, ("task", "metric"))
