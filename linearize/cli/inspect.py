"""`linearize inspect`: every attention of a model, matched or refused and why. Changes nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearize.cli._mixers import Mixers
from linearize.cli._models import MODEL_HELP, load_source
from linearize.cli._shell import out, say
from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from torch import nn

    from linearize.plan import Plan
    from linearize.program import Program, Record
    from linearize.recipe import Recipe

SOME_REFUSED = 2


def inspect_model(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)],
    recipe: Annotated[
        str | None, typer.Option("--recipe", "-r", help="Also show what this recipe plans for every attention.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
    why: Annotated[
        int | None, typer.Option(help="Everything known about one attention: what was proved, or what stopped it.")
    ] = None,
    stage: Annotated[
        str | None, typer.Option(help="The program as text after this pass or stage; later ones with --recipe.")
    ] = None,
    save_plan: Annotated[
        Path | None, typer.Option(help="Write the recipe's plan to this file, to edit it for compile --plan.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write one page with graphs, costs and stages.", show_default=False)
    ] = None,
    dot: Annotated[bool, typer.Option("--dot", help="Print the graph for Graphviz.")] = False,
    svg: Annotated[bool, typer.Option("--svg", help="Print the graph as SVG.")] = False,
    python: Annotated[bool, typer.Option("--python", help="Print the program as Python-like text.")] = False,
    tokens: Annotated[
        int, typer.Option(min=0, help="With --html and --recipe: fit on so many, to show errors.")
    ] = 0,
    mixers: Mixers = None,
) -> None:
    """Show every attention of a model: matched, or refused and why.

    The model is captured and read; nothing in it is changed. With --html, --dot, --svg or --python MODEL may also be a
    directory that linearize compile wrote.

    Exit code 0 when every attention was matched, 2 when some were refused, 1 on an error.
    """
    from linearize.api import plan_sites
    from linearize.capture import capture
    from linearize.recipe import Recipe

    policy = Recipe.load(recipe) if recipe is not None else None
    if save_plan is not None and policy is None:
        raise LinearizeError("--save-plan needs --recipe: the plan is what the recipe decides")
    pipes = [name for name, wanted in (("dot", dot), ("svg", svg), ("python", python)) if wanted]
    if len(pipes) > 1 or (pipes and html is not None):
        raise LinearizeError("choose one of --html, --dot, --svg and --python")
    if pipes or html is not None:
        from linearize.cli._drawing import draw

        if draw(model, policy, tokens, html, pipes[0] if pipes else None):
            raise typer.Exit(SOME_REFUSED)
        return
    source = load_source(model)
    if stage is not None:
        print_stage(source, policy, stage)
        return
    say(f"capturing {type(source).__name__}")
    program = capture(source)
    plan = plan_sites(program, policy) if policy is not None else None
    if plan is not None and save_plan is not None:
        plan.save(save_plan)
    if why is not None:
        print_why(program, plan, why)
    elif as_json:
        print_json(program, policy)
    else:
        print_tables(program, plan)
    if program.refused:
        raise typer.Exit(SOME_REFUSED)


def print_json(program: Program, recipe: Recipe | None) -> None:
    from linearize.api import describe

    print(json.dumps(describe(program, recipe), indent=1))


def print_tables(program: Program, plan: Plan | None) -> None:
    from linearize import printing

    console = out()
    console.print(printing.program_summary(program))
    if program.sites:
        console.print(printing.sites_table(program.sites, plan))
    console.print(printing.notes(inspect_notes(program, plan)))


def inspect_notes(program: Program, plan: Plan | None) -> list[str]:
    from linearize.passes.rewrite import read_carried
    from linearize.printing import refusals

    notes = [*refusals(program.sites, plan), *program.notes, *read_carried(program)]
    if not program.sites:
        notes.append("no softmax attention was found in this model: there is nothing to replace")
    if program.refused:
        notes.append(f"--why {program.refused[0].index} shows what stopped the match of that site")
    if program.matched and plan is None:
        notes.append("--recipe lolcats shows what would become of each attention")
    return notes


def print_why(program: Program, plan: Plan | None, index: int) -> None:
    """Raises LinearizeError when there is no such site."""
    from linearize import printing

    site = next((site for site in program.sites if site.index == index), None)
    if site is None:
        raise LinearizeError(f"there is no site {index}; {program.model_name} has {len(program.sites)}, from 0")
    out().print(printing.site_details(site, plan))


def print_stage(source: nn.Module, recipe: Recipe | None, stage: str) -> None:
    """Raises LinearizeError when no pass or stage has that name."""
    from linearize import printing

    say(f"capturing {type(source).__name__}")
    history = program_history(source, recipe)
    names = [record.name for record in history]
    wanted = last_passes().get(stage, stage)
    if wanted not in names:
        hint = "" if recipe is not None else "; --recipe adds those that rewrite and lower"
        raise LinearizeError(f"no pass or stage {stage!r}; there are {', '.join(names)}{hint}")
    at = names.index(wanted)
    console = out()
    console.print(printing.record_text(history[at], history[at - 1] if at else None), soft_wrap=True)


def program_history(source: nn.Module, recipe: Recipe | None) -> tuple[Record, ...]:
    """What each pass left, without fitting: up to the raised program, or with a recipe to the lowered one."""
    from linearize.api import compile
    from linearize.capture import capture
    from linearize.passes.rewrite import RaiseAttention
    from linearize.pipeline import run_pipeline

    if recipe is not None:
        return compile(source, recipe, tokens=0, progress=False).program.history
    return run_pipeline(capture(source), [RaiseAttention()]).history


def last_passes() -> dict[str, str]:
    """The last pass of every stage: `normalise` -> `unify_sizes`."""
    from linearize.passes import CAPTURE_PASSES
    from linearize.passes.lower import LOWER_PASSES
    from linearize.passes.rewrite import InsertMixers, RaiseAttention

    ordered: list[Any] = [*CAPTURE_PASSES, RaiseAttention, InsertMixers, *LOWER_PASSES]
    return {step.stage.name.lower(): step.name for step in ordered}
