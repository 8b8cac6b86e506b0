"""`linearize bench`: a compiled model's speed and memory beside its source's, as ratios in one run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearize.cli._mixers import Mixers
from linearize.cli._models import MODEL_HELP, load_source
from linearize.cli._shell import err, out, say
from linearize.errors import DataError

if TYPE_CHECKING:
    from linearize.printing import Figure
    from linearize.runtime.bench import Measured


def bench(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What linearize compile wrote.", show_default=False)],
    against: Annotated[str, typer.Option("--against", "-a", metavar="MODEL", help=f"Its source: {MODEL_HELP}")],
    contexts: Annotated[str, typer.Option(help="Tokens of context, by commas.")] = "512,4096,16384",
    batches: Annotated[str, typer.Option(help="Sequences at once, by commas.")] = "1,8",
    steps: Annotated[int, typer.Option(min=1, help="Decode steps of each; the median counts.")] = 20,
    compile_step: Annotated[bool, typer.Option("--compile", help="Compile the decode step first.")] = False,
    first_token: Annotated[bool, typer.Option(help="Also time a whole prompt, which is slow for the source.")] = True,
    plot: Annotated[Path | None, typer.Option(help="Write the plots to this SVG file.", show_default=False)] = None,
    as_json: Annotated[Path | None, typer.Option("--json", help="Write the figures.", show_default=False)] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of torch. [dim]Its own choice.[/dim]")] = None,
    mixers: Mixers = None,
) -> None:
    """Measure decoding, time to the first token and memory beside the source, by context and batch.

    Steps of both are taken in turn in one process: the ratios hold on a busy machine, the absolute numbers do not.
    """
    import torch

    import linearize
    from linearize.runtime.bench import measure

    lengths, sizes = numbers(contexts, "--contexts"), numbers(batches, "--batches")
    if threads is not None:
        torch.set_num_threads(threads)
    compiled, source = linearize.load(directory), load_source(against)
    if compile_step:
        compiled.compile_step()
    say(f"measuring on {compiled.device} with {torch.get_num_threads()} threads")
    rows = []
    with err().status("") as status:
        for row in measure(source, compiled, lengths, sizes, steps, first_token):
            rows.append(row)
            status.update(f"context {row.context:,}, batch {row.batch}: {row.speedup:.2f} times the source's speed")
    if compiled.compiled_step is not None and compiled.compiled_step.reason:
        say(f"the step ran uncompiled: {compiled.compiled_step.reason}")
    for figure in tables(rows):
        out().print(figure.drawn(), "")
    if plot is not None:
        write(plot, plots(rows))
    if as_json is not None:
        write(as_json, to_json(rows))


def numbers(text: str, option: str) -> list[int]:
    """`512,4096` as integers.

    Raises:
        DataError: it is no list of positive integers.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1:
        raise DataError(f"{option} {text!r} is no list of numbers above 0, such as 512,4096")
    return found


def tables(rows: Sequence[Measured]) -> list[Figure]:
    """Decoding, the time to the first token where it was measured, and memory; each with how many times better."""
    from linearize.printing import Figure, bytes_text

    def figure(title: str, cells: Sequence[tuple[Measured, tuple[float, float], float]], text: Any) -> Figure:
        made = [
            (f"{row.context:,}", str(row.batch), text(pair[0]), text(pair[1]), f"{ratio:.2f}")
            for row, pair, ratio in cells
        ]
        return Figure(title, ("context", "batch", "source", "linearized", "times"), made)

    speed = [(row, row.tokens_per_second, row.speedup) for row in rows]
    waited = [(row, row.first_token, row.first_token[0] / row.first_token[1]) for row in rows if row.first_token]
    peak = [(row, row.peak, row.peak[0] / row.peak[1]) for row in rows]
    found = [
        figure("decoding, tokens per second of all rows", speed, lambda value: f"{value:,.0f}"),
        figure("seconds from a prompt of that length to its next token", waited, lambda value: f"{value:.2f}"),
        figure("most memory of tensors alive in a step, cache or state included", peak, bytes_text),
    ]
    return [one for one in found if one.rows]


def plots(rows: Sequence[Measured]) -> str:
    """Two plots in one SVG: tokens per second, and peak memory, by context."""
    from linearize.printing import bytes_text
    from linearize.svg import Line, beside, line_plot

    def series(which: str) -> list[Line]:
        return [
            Line(f"{name} x{batch}", [(row.context, getattr(row, which)[place]) for row in rows if row.batch == batch])
            for batch in sorted({row.batch for row in rows})
            for place, name in enumerate(("source", "linearized"))
        ]

    speed = line_plot(series("tokens_per_second"), "tokens per second", "tokens of context", lambda value: f"{value:g}")
    memory = line_plot(series("peak"), "peak memory of a step", "tokens of context", bytes_text, base=2)
    return beside([speed, memory])


def to_json(rows: Sequence[Measured]) -> str:
    import json
    from dataclasses import asdict

    return json.dumps([{**asdict(row), "speedup": row.speedup} for row in rows], indent=1)


def write(path: Path, text: str) -> None:
    from linearize.files import write_atomically

    write_atomically(path, text.encode())
    out().print(f"wrote {path}", soft_wrap=True)
