"""`--mixers FILE.py` of every command that builds mixers: the user's own, loaded before anything else happens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def load_files(files: list[Path] | None) -> list[Path] | None:
    """Raises RecipeError when one cannot be loaded."""
    if files:
        from linearize.mixers.files import load_mixers

        for file in files:
            load_mixers(file)
    return files


Mixers = Annotated[
    list[Path] | None,
    typer.Option(
        "--mixers",
        metavar="FILE.py",
        envvar="LINEARIZE_MIXERS",
        callback=load_files,
        show_default=False,
        help="Python file with mixers of your own, which is executed. May be given again.",
    ),
]
