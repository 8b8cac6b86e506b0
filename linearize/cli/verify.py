"""`linearize verify`: check an exported directory again, here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from linearize.cli._mixers import Mixers
from linearize.cli._shell import out


def verify(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What linearize export wrote.", show_default=False)],
    against: Annotated[
        Path | None,
        typer.Option("--against", metavar="COMPILED", help="Also compare with this compiled model in PyTorch."),
    ] = None,
    mixers: Mixers = None,
) -> None:
    """Check that an exported directory is what was written, and computes here what it computed there.

    Hashes, the manifest against the graph, then the prompt whose logits and tokens the manifest holds, whole and in
    pieces. Needs no PyTorch model; --against repeats the full comparison with one.
    """
    from linearize.export.probe import check_directory

    found = check_directory(directory)
    console = out()
    console.print(
        f"{directory}: {found.tokens_equal} of {found.tokens} greedy tokens as recorded, logits within "
        f"{found.logit_difference:.2g}, pieces within {found.piece_difference:.2g} of the whole "
        f"(relative; {found.tolerance:g} is allowed)",
        soft_wrap=True,
    )
    if against is not None:
        import linearize
        from linearize.export.write import compare

        largest = compare(linearize.load(against), directory)
        console.print(f"equals {against}: logits within {largest:.2g}", soft_wrap=True)
