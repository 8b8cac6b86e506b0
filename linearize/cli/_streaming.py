"""The options of commands that can work on a model one block at a time."""

from __future__ import annotations

from typing import Annotated

import typer

Streaming = Annotated[
    bool | None,
    typer.Option(
        help="One block of the model in memory at a time. By itself where a local model does not fit.",
        show_default=False,
    ),
]
Memory = Annotated[
    str | None,
    typer.Option(metavar="SIZE", help="Memory that streaming may take: 8GiB. What is free.", show_default=False),
]
