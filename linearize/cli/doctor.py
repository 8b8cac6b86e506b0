"""`linearize doctor`: what is installed, which kernels will be used, and why not the others."""

from __future__ import annotations

import importlib.metadata
import os
import platform

import typer
from rich.text import Text

from linearize.cli._shell import out

GOOD, BAD, NONE = "ok", "wrong", "-"
STYLES = {GOOD: "green", BAD: "red", NONE: "dim", "available": "green"}


def doctor() -> None:
    """Say what is installed, which kernels will be used, and why not the others.

    Exit code 1 when something that linearize needs is missing or outside the versions that it is written for.
    """
    rows = package_rows()
    show("packages", ("", "package", "installed", "wanted"), rows)
    show("machine", ("", " "), machine_rows())
    show("kernels, the one asked first in front", ("operator", "device", "kernel", "state"), kernel_rows())
    if any(row[0] == BAD for row in rows):
        raise typer.Exit(1)


def show(title: str, headers: tuple[str, ...], rows: list[tuple[str, ...]]) -> None:
    from linearize.printing import table

    made = table(*headers, title=title)
    for row in rows:
        made.add_row(*[Text(cell, style=STYLES.get(cell, "")) for cell in row])
    out().print(made, "")


def package_rows() -> list[tuple[str, ...]]:
    """State, name, installed version and wanted range of everything that the package requires, and of triton."""
    from packaging.requirements import Requirement

    own = [(GOOD, "linearize", importlib.metadata.version("linearize"), "")]
    parsed = [Requirement(line) for line in importlib.metadata.requires("linearize") or []]
    needed = [one for one in parsed if one.marker is None or one.marker.evaluate({"extra": ""})]
    gpu = list({one.name: one for one in parsed if one.name == "triton"}.values())  # two extras name it
    return own + [package_row(one, needed=True) for one in needed] + [package_row(one, needed=False) for one in gpu]


def package_row(requirement: object, needed: bool) -> tuple[str, ...]:
    name, wanted = requirement.name, requirement.specifier  # type: ignore[attr-defined]
    note = str(wanted) if needed else f"{wanted} (only for GPU kernels)"
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return (BAD if needed else NONE, name, "not installed", note)
    fits = wanted.contains(version, prereleases=True)
    return (GOOD if fits else BAD if needed else NONE, name, version, note)


def machine_rows() -> list[tuple[str, ...]]:
    import torch

    from linearize.api import demo_model_dir

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    demo = demo_model_dir() / "model.safetensors"
    return [
        ("python", f"{platform.python_version()} ({platform.system()} {platform.machine()})"),
        ("processor", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads"),
        ("GPU", ", ".join(devices) or "none that torch can use"),
        ("demo model", str(demo.parent) if demo.is_file() else f"missing: {demo}"),
    ]


def kernel_rows() -> list[tuple[str, ...]]:
    """Every kernel of every operator, the reference last; those for a GPU too, with why they cannot be used here."""
    import torch

    from linearize.kernels import registry
    from linearize.ops import OPERATORS

    no_device = {} if torch.cuda.is_available() else {"cuda": "torch finds no GPU"}
    return [
        (op, device, name, state if state != "available" else no_device.get(device, state))
        for op in OPERATORS
        for device in registry.DISPATCH_KEYS
        for name, state in registry.explain(op, device)
        if registry.kernels_for(op, device)
    ]
