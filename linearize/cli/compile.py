"""`linearize compile`: a model in, a directory with its fixed-state version out."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearize.cli._mixers import Mixers
from linearize.cli._models import (
    COMPILED,
    MODEL_HELP,
    config_of,
    load_source,
    locate,
    read_calibration,
)
from linearize.cli._shell import out, say
from linearize.cli._streaming import Memory, Streaming

if TYPE_CHECKING:
    from linearize.calibration.sources import TextRows
    from linearize.runtime.model import LinearizedModel

DATA_HELP = (
    "Text to fit on: a text file, JSON lines, a folder of both, a saved dataset, [b]hf:org/name[/b], or rows made on "
    "the fly ([b]recall[/b], [b]long[/b]); may be repeated, [b]corpus.txt=3[/b] has weight 3. "
    "Without any the model's own samples are used."
)


def compile_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Directory to write; it must not exist yet.", show_default=False
        ),
    ],
    recipe: Annotated[
        str,
        typer.Option("--recipe", "-r", help="A name, a name with options (lolcats{window=32}), or a .toml file."),
    ] = "auto",
    data: Annotated[list[str] | None, typer.Option(metavar="SOURCE", help=DATA_HELP)] = None,
    tokens: Annotated[
        int | None, typer.Option(min=0, help="Tokens to fit on; 0 leaves the mixers at their start. By recipe.")
    ] = None,
    distill: Annotated[
        int | None,
        typer.Option(
            min=0, metavar="TOKENS", help="Then train the whole model on so many tokens, by KL to the source. None."
        ),
    ] = None,
    seed: Annotated[int, typer.Option(help="Of samples and of the fit.")] = 0,
    window: Annotated[int | None, typer.Option(min=1, help="The recipe's window, in tokens.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="A plan to follow, which linearize plan or inspect --save-plan wrote.")
    ] = None,
    mixers: Mixers = None,
    streaming: Streaming = None,
    memory: Memory = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no report.")] = False,
) -> None:
    """Replace a model's softmax attention by mixers with a fixed-size state, and fit them to it.

    DIR holds weights, graph, plan, report and the tokenizer. It appears complete or not at all. While fitting, finished
    layers are kept in DIR.fitting: after an interruption the same command goes on from them.
    """
    from linearize.calibration.limits import parse_bytes
    from linearize.calibration.parallel import joined, launched_rank, rank
    from linearize.files import check_new_directory

    quiet = quiet or launched_rank() > 0
    check_new_directory(output)
    most = parse_bytes(memory) if memory is not None else None
    from linearize.calibration.sources import parse_source

    sources = [parse_source(text) for text in data or []]
    import linearize
    from linearize.plan_file import read_plan
    from linearize.recipe import Recipe

    policy = Recipe.load(recipe)
    policy = policy if window is None else policy.with_options(window=window)
    chosen = read_plan(plan).plan if plan is not None else None
    fit = (chosen.fit if chosen is not None else None) or policy.fit
    directory = streamed_directory(model, streaming, most)
    source = load_source(model) if directory is None else None
    config = config_of(source if source is not None else str(directory))
    whole = policy.distill.tokens if distill is None else distill
    wanted = max(fit.tokens if tokens is None else tokens, whole * 8 // 7)  # an eighth is held out
    calibration = read_calibration(sources, model, config, fit, wanted) if sources else None
    started = time.perf_counter()
    if not quiet:
        how = f"{model} block by block" if source is None else type(source).__name__
        announce(how, f"recipe {recipe}" if plan is None else f"plan {plan}", calibration)
    with joined(), kept_beside(output, quiet) as folder:
        if source is None:
            from linearize.on_disk import compile_directory

            compiled = compile_directory(
                str(directory), output, policy, calibration=calibration, plan=chosen, tokens=tokens, distill=distill,
                seed=seed, progress=not quiet, memory=most, work=folder, say=(lambda text: None) if quiet else say,
            )  # fmt: skip
        else:
            compiled = linearize.compile(
                source, policy, calibration=calibration, plan=plan, tokens=tokens, distill=distill, seed=seed,
                progress=not quiet, checkpoints=folder,
            )  # fmt: skip
            if not rank():
                compiled.save_pretrained(output)
    if not quiet:
        print_report(compiled, output, time.perf_counter() - started)


def announce(model: str, way: str, calibration: TextRows | None) -> None:
    """What is about to be done, and with which data."""
    say(f"compiling {model} with {way}")
    for line in calibration.report() if calibration is not None else ():
        say(f"data: {line}")


def streamed_directory(model: str, streaming: bool | None, memory: int | None) -> str | None:
    """The directory to stream from; None where MODEL is loaded whole.

    Raises:
        ArtifactError: streaming is asked for, and MODEL is no local directory.
    """
    from linearize.errors import ArtifactError

    if streaming is False:
        return None
    location = locate(model)
    if location is None or not Path(location).is_dir() or Path(location, COMPILED).is_file():
        if streaming or memory is not None:
            raise ArtifactError(f"{model} is no local directory of a transformers model, which is what can be streamed")
        return None
    if streaming or memory is not None:
        return location
    from linearize.on_disk import needs_streaming

    return location if needs_streaming(location) else None


@contextlib.contextmanager
def kept_beside(output: Path, quiet: bool) -> Iterator[Path]:
    """The folder for finished layers: removed when all went well, named to the user when it did not."""
    from linearize.calibration.checkpoints import forget
    from linearize.calibration.parallel import launched_rank, rank

    folder = output.absolute().with_name(f"{output.absolute().name}.fitting")
    if folder.is_dir() and not quiet:
        say(f"going on from what an earlier run left in {folder.name}")
    try:
        yield folder
    except BaseException:
        if folder.is_dir() and not launched_rank():
            say(f"finished layers are kept in {folder}; the same command goes on from them")
        raise
    if not rank():
        forget(folder)


def print_report(compiled: LinearizedModel, output: Path, seconds: float) -> None:
    from linearize import printing

    console = out()
    console.print(printing.report_table(compiled.report))
    if compiled.report.end_to_end is not None:
        console.print(printing.end_to_end_text(compiled.report.end_to_end))
    console.print(printing.notes([*compiled.report.notes, *compiled.report.refused]))
    console.print(f"state {state_text(compiled)}", style="dim", soft_wrap=True)
    console.print(f"wrote {output} in {seconds:.0f} s", soft_wrap=True)
    if (output / "tokenizer.json").is_file():
        console.print(f'try   linearize generate {output} "..."', style="dim", soft_wrap=True, markup=False)


def state_text(compiled: LinearizedModel) -> str:
    """`130 KiB a sequence at any context`, or what it grows by where softmax layers were kept."""
    from linearize.printing import bytes_text

    start, later = compiled.state_bytes(context=0), compiled.state_bytes(context=1024)
    if start == later:
        return f"{bytes_text(start)} a sequence, whatever its length"
    return f"{bytes_text(start)} a sequence and {bytes_text((later - start) / 1024)} more with every token"
