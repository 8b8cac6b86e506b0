"""`linearize plan`: the best model under a budget, as a plan that can be edited and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearize.cli._mixers import Mixers
from linearize.cli._models import MODEL_HELP, config_of, limit_of, load_source
from linearize.cli._shell import out, say
from linearize.cli._streaming import Memory, Streaming
from linearize.errors import DataError, LinearizeError, RecipeError

if TYPE_CHECKING:
    from torch import nn

    from linearize.plan import Plan
    from linearize.planner.make import Wishes
    from linearize.planner.planning import Planner
    from linearize.program import Program


def plan_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    context: Annotated[str, typer.Option(help="Tokens behind the next one: 4096, 32k.")] = "4k",
    budget: Annotated[
        str, typer.Option(help="Of state: 25% of the source's cache, 3MiB; or 2.5ms a decoded token on the target.")
    ] = "25%",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Write the plan here.", show_default=False)
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences at once.")] = 1,
    target: Annotated[str, typer.Option(help="cpu (timed here once), h200, or a .json file.")] = "cpu",
    pin: Annotated[
        list[str] | None, typer.Option(metavar="SITE=MIXER", help="What a site must become: 0=keep. Repeatable.")
    ] = None,
    never: Annotated[list[str] | None, typer.Option(metavar="MIXER", help="What no site becomes: drop.")] = None,
    use: Annotated[
        list[str] | None, typer.Option(metavar="MIXER", help="Choose among these mixers and keep only.")
    ] = None,
    add: Annotated[
        list[str] | None, typer.Option(metavar="MIXER{...}", help="A further candidate: citrus{keep=256}. Repeatable.")
    ] = None,
    weights: Annotated[
        str,
        typer.Option(
            metavar="BUDGET",
            help="Of weights: 80% of the source's bytes, 3GiB. They become products of two thin ones (SVD-LLM).",
            show_default=False,
        ),
    ] = "",
    exports: Annotated[
        list[str] | None,
        typer.Option(
            metavar="WAY",
            help="Only what this export takes: onnx, portable, genai, torchscript, pt2. Repeatable.",
        ),
    ] = None,
    heads: Annotated[bool, typer.Option(help="Let the kv heads of a layer differ.")] = True,
    data: Annotated[list[str] | None, typer.Option(metavar="SOURCE", help="Text to score on, as for compile.")] = None,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens to score on, and as many to measure plans on.")] = 4096,
    length: Annotated[int, typer.Option(min=32, help="Longest row to score on.")] = 2048,
    measurements: Annotated[int, typer.Option(min=0, help="Plans to measure around the solution.")] = 6,
    pareto: Annotated[
        Path | None, typer.Option(help="Also draw loss over bytes for many budgets, as .svg.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of samples.")] = 0,
    streaming: Streaming = None,
    memory: Memory = None,
    mixers: Mixers = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
) -> None:
    """Find what every attention should become under a budget, and show the trade-off.

    Scores are measured on the model once and remembered; another budget takes seconds. The plan is JSON to edit and to
    compile: linearize compile MODEL -o DIR --plan FILE.
    """
    from linearize.calibration.limits import parse_bytes
    from linearize.cli.compile import streamed_directory
    from linearize.planner.budgets import parse_budget, parse_context, parse_mixer, parse_pin
    from linearize.planner.make import Wishes, make_planner
    from linearize.planner.target import load_target

    if pareto is not None and pareto.suffix not in (".svg", ".html"):
        raise LinearizeError(f"--pareto draws .svg or .html, not {pareto.name}")
    wanted = parse_context(context)
    parse_budget(budget, 1)
    if weights:
        parse_budget(weights, 1)
    extra = tuple(parse_mixer(text) for text in add or ())
    pins = dict(parse_pin(text) for text in pin or ())
    wishes = Wishes(pins, tuple(never or ()), tuple(use or ()), extra, heads, tuple(exports or ()), weights)
    check_names(wishes)
    most = parse_bytes(memory) if memory is not None else None
    directory = streamed_directory(model, streaming, most)
    machine = load_target(target)
    program, source = read_model(model, directory)
    config = config_of(source if source is not None else str(directory))
    check_pins(wishes, [site.index for site in program.matched])
    longest = min(length, wanted, limit_of(config) or length)
    rows = read_rows_of(data, model, config, longest, 2 * tokens)
    planner = make_planner(
        program, wanted, machine, batch=batch, data=rows, tokens=tokens, length=longest, wishes=wishes, seed=seed,
        progress=not quiet, memory=most, say=say,
    )  # fmt: skip
    for reason, names in planner.left_out.items():
        say(f"left out: {', '.join(names)}: {reason}")
    limit = parse_budget(budget, planner.source_bytes)
    chosen = planner.best(limit, measurements)
    plan = planner.plan(chosen, limit, source_seconds(source, planner) if source is not None else None)
    show(plan)
    if output is not None:
        plan.save(output)
        out().print(f"wrote {output}: linearize compile {model} -o DIR --plan {output}", soft_wrap=True)
    if pareto is not None:
        draw(planner, pareto, measurements, model)


def check_names(wishes: Wishes) -> None:
    """Raises RecipeError where a mixer, ExportError where a way of exporting is named that there is none of."""
    from linearize.mixers import mixer_class
    from linearize.planner.exports import ways_of

    ways_of(wishes.exports)
    for name in (*wishes.never, *wishes.mixers, *(mixer for mixer, _ in (*wishes.pins.values(), *wishes.extra))):
        mixer_class(name)


def check_pins(wishes: Wishes, sites: list[int]) -> None:
    """Raises RecipeError where a site is pinned that the model does not have."""
    unknown = sorted(set(wishes.pins) - set(sites))
    if unknown:
        raise RecipeError(f"site {unknown[0]} cannot be pinned: the model's matched sites are {sites}")


def read_model(name: str, directory: str | None) -> tuple[Program, nn.Module | None]:
    """(captured, the model); of a directory that stays on disk the program alone.

    Raises:
        RewriteError: it stays on disk, and could not be compiled from there.
    """
    if directory is not None:
        from linearize.capture.on_disk import capture_directory
        from linearize.on_disk import check_pieces
        from linearize.passes.rewrite import RaiseAttention
        from linearize.pipeline import run_pipeline

        say(f"capturing {name} block by block")
        program = run_pipeline(capture_directory(directory), [RaiseAttention()])
        check_pieces(program)
        return program, None
    from linearize.capture import capture

    source = load_source(name)
    say(f"capturing {type(source).__name__}")
    return capture(source), source


def read_rows_of(data: list[str] | None, name: str, config: dict[str, Any], length: int, tokens: int) -> Any:
    """Batches of token ids from the user's text; None without any."""
    if not data:
        return None
    from linearize.calibration.sources import parse_source
    from linearize.cli._models import read_calibration
    from linearize.plan import Fit

    fit = Fit(tokens=tokens, length=length, batch=1)
    return read_calibration([parse_source(text) for text in data], name, config, fit, tokens)


def source_seconds(source: nn.Module, planner: Planner) -> float | None:
    """Predicted, of one token of the source with its cache; None where that cannot be counted."""
    from linearize.planner.source import source_calls

    if planner.batch != 1:
        return None
    try:
        return planner.target.seconds(source_calls(source, planner.context), graph=False)
    except DataError:
        return None


def show(plan: Plan) -> None:
    from linearize import printing
    from linearize.printing import bytes_text

    figures, console = plan.figures, out()
    assert figures is not None
    console.print(printing.plan_table(plan))
    share = figures.state_bytes / figures.source_bytes
    loss = "not measured" if figures.measured_loss is None else f"measured {figures.measured_loss:.4g}"
    how = " (to second order, from gradients)" if figures.estimate else ""
    lines = [
        f"state {bytes_text(figures.state_bytes)} of {bytes_text(figures.source_bytes)} ({share:.1%}) at "
        f"{figures.context:,} tokens, {figures.batch} at once",
        f"loss, KL from the source in nats a token: predicted {figures.predicted_loss:.4g}{how}, {loss}",
    ]
    if figures.predicted_seconds:
        speed = f"decoding on {figures.target}: predicted {1e3 * figures.predicted_seconds:.3g} ms a token"
        if figures.source_seconds:
            speed += f", the source {1e3 * figures.source_seconds:.3g} ms"
        lines.append(speed)
    if figures.weight_bytes is not None and figures.source_weight_bytes is not None:
        share = figures.weight_bytes / figures.source_weight_bytes
        lines.append(f"weights {bytes_text(figures.weight_bytes)} of {bytes_text(figures.source_weight_bytes)} "
                     f"({share:.1%}), {len(plan.low_rank)} of them products of two")  # fmt: skip
    console.print(printing.notes(lines))


def draw(planner: Planner, file: Path, measurements: int, model: str) -> None:
    from linearize.files import write_atomically
    from linearize.planner.pareto import curve, drawn, recipe_marks

    say("measuring plans over budgets, and the recipes")
    marks = curve(planner, measurements=measurements)
    others = recipe_marks(planner)
    svg = drawn(marks, others, planner.source_bytes, f"{model}: loss by state at {planner.context:,} tokens")
    text = svg if file.suffix == ".svg" else f"<!doctype html><meta charset=utf-8><title>{model}</title>{svg}"
    write_atomically(file, (text + "\n").encode())
    out().print(f"wrote {file}: {len(marks)} budgets, {len(others)} recipes", soft_wrap=True)
