"""`linearize recipes`: what a model can be compiled to."""

from __future__ import annotations

from typing import Annotated

import typer

from linearize.cli._mixers import Mixers
from linearize.cli._shell import out


def recipes(
    name: Annotated[str | None, typer.Argument(help="Show one recipe in full.", show_default=False)] = None,
    mixers: Mixers = None,
) -> None:
    """List the recipes, or show one: which mixer each layer gets, its options, and how it is fitted."""
    from linearize import printing
    from linearize.recipe import Recipe
    from linearize.recipe import recipes as names

    if name is not None:
        out().print(printing.recipe_details(Recipe.load(name)))
        return
    out().print(printing.recipes_table([Recipe.load(item) for item in names()]))
    out().print(printing.notes(["linearize recipes NAME shows one in full; a .toml file of that form is a recipe too"]))
