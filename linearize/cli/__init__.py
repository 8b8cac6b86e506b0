"""The command line: one file a command. Nothing heavy is imported before a command runs."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize.cli._shell import Shell
from linearize.cli.bench import bench
from linearize.cli.compile import compile_model
from linearize.cli.demo import demo
from linearize.cli.doctor import doctor
from linearize.cli.evaluate import evaluate
from linearize.cli.export import export_model
from linearize.cli.generate import generate
from linearize.cli.inspect import inspect_model
from linearize.cli.plan import plan_model
from linearize.cli.recipes import recipes
from linearize.cli.serve import serve
from linearize.cli.verify import verify

app = typer.Typer(
    name="linearize",
    cls=Shell,
    add_completion=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show warnings, and tracebacks of errors. Before or after the command.")
    ] = False,
) -> None:
    """Turn a decoder-only language model with softmax attention into one with a fixed-size state.

    [dim]Start with[/dim]  linearize demo   [dim]or[/dim]  linearize inspect MODEL
    """
    if version:
        from linearize import __version__

        print(f"linearize {__version__}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


app.command("demo")(demo)
app.command("inspect")(inspect_model)
app.command("plan")(plan_model)
app.command("compile")(compile_model)
app.command("eval")(evaluate)
app.command("generate")(generate)
app.command("bench")(bench)
app.command("serve")(serve)
app.command("export")(export_model)
app.command("verify")(verify)
app.command("recipes")(recipes)
app.command("doctor")(doctor)


def main() -> None:
    """Entry point of the `linearize` script."""
    app(prog_name="linearize")
