"""What `linearize inspect` draws of a model: the page, DOT, SVG, or the program as text."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.cli._models import COMPILED, load_source, locate
from linearize.cli._shell import out, say
from linearize.errors import LinearizeError

if TYPE_CHECKING:
    from linearize.page.build import Subject
    from linearize.recipe import Recipe


def draw(model: str, recipe: Recipe | None, tokens: int, html: Path | None, pipe: str | None) -> int:
    """Write the page to `html`, or print the graph as `pipe` says; how many attentions were refused.

    Raises:
        LinearizeError: the model cannot be loaded or captured, or the file cannot be written.
    """
    if html is not None and (html.is_dir() or not html.absolute().parent.is_dir()):
        raise LinearizeError(f"cannot write {html}: it is a directory, or in none")
    subject = subject_of(model, recipe, tokens)
    if html is not None:
        from linearize.files import write_atomically
        from linearize.page.build import page

        content = page(subject).encode()
        write_atomically(html, content)
        out().print(f"wrote {html} ({len(content) / 1e6:.1f} MB): open it in a browser", soft_wrap=True)
    if pipe is not None:
        sys.stdout.write(piped(subject, pipe) + "\n")
    return len(subject.program.refused)


def piped(subject: Subject, pipe: str) -> str:
    """The graph after the recipe, or before it where there is none."""
    from linearize.page.pipes import dot, svg
    from linearize.program import program_text

    program = subject.after or subject.program
    return {"dot": dot, "svg": svg, "python": program_text}[pipe](program)


def subject_of(model: str, recipe: Recipe | None, tokens: int) -> Subject:
    """A source model before and, with a recipe, after; of a compiled directory what it holds."""
    import linearize
    from linearize.capture import capture
    from linearize.cli.inspect import inspect_notes
    from linearize.page.build import Subject

    if (location := locate(model)) is not None and Path(location, COMPILED).is_file():
        compiled = linearize.load(location)
        program, plan, report = compiled.program, compiled.plan, compiled.report
        return Subject(program.model_name, None, program, plan, report, compiled.program.history, report.refused)
    source = load_source(model)
    say(f"capturing {type(source).__name__}")
    before = capture(source)
    if recipe is None:
        return Subject(before.model_name, before, None, None, None, before.history, inspect_notes(before, None))
    say("compiling" + (f", fitting on {tokens:,} tokens" if tokens else " without fitting"))
    compiled = linearize.compile(before, recipe, tokens=tokens, progress=tokens > 0)
    history = compiled.program.history
    notes = inspect_notes(before, compiled.plan)
    return Subject(before.model_name, before, compiled.program, compiled.plan, compiled.report, history, notes)
