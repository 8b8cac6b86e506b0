"""export(): everything is checked before the work, and what is written is checked before it is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from linearize.errors import ExportError
from linearize.files import check_new_directory, new_directory

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel

Writer = Callable[["LinearizedModel", Path], None]


def export(compiled: LinearizedModel, directory: str | Path, format: str = "onnx") -> Path:
    """Write a compiled model to a new directory in a format that runs without PyTorch.

    Args:
        compiled: what `linearize.compile` or `linearize.load` returned, on the CPU in float32.
        directory: must not exist, or be empty. It appears complete or not at all.
        format: "onnx", the only one so far: `model.onnx`, `model.safetensors`, `linearize.json`, tokenizer files.

    Returns:
        The directory.

    Raises:
        ExportError: not a compiled model, an unknown format, a model that cannot run step by step, an operator that
            the format cannot express, or a file that disagrees with PyTorch.
        ArtifactError: the directory exists or cannot be written.
    """
    writer = _writer(format)
    check_exportable(compiled)
    check_new_directory(directory)
    with new_directory(directory) as folder:
        writer(compiled, folder)
    return Path(directory)


def _write_onnx(compiled: LinearizedModel, folder: Path) -> None:
    from linearize.export.manifest import describe, write_manifest
    from linearize.export.onnx import write_onnx
    from linearize.export.parity import check_parity

    write_onnx(compiled, folder)
    for name, content in compiled.files.items():
        (folder / name).write_bytes(content)
    manifest = describe(compiled, folder)
    write_manifest(manifest, folder)  # unverified; the check reads it as a user would
    verified = check_parity(compiled, folder)
    write_manifest(manifest.model_copy(update={"verified": verified}), folder)


WRITERS: dict[str, Writer] = {"onnx": _write_onnx}


def _writer(format: str) -> Writer:
    if format not in WRITERS:
        raise ExportError(f"no export format {format!r}; there are {', '.join(sorted(WRITERS))}")
    return WRITERS[format]


def check_exportable(compiled: object) -> None:
    """Refuse what could not be written, before any work.

    Raises:
        ExportError: see `export`.
    """
    import torch

    from linearize.runtime.model import LinearizedModel

    if not isinstance(compiled, LinearizedModel):
        raise ExportError(
            f"export takes what linearize.compile or linearize.load returns, not a {type(compiled).__name__}"
        )
    if compiled.program.stateless_reason:
        raise ExportError(
            f"this model cannot run step by step, so it has no state to export: {compiled.program.stateless_reason}"
        )
    if compiled.program.leaves:
        raise ExportError(
            f"{', '.join(compiled.program.leaves)} could not be traced and run the source's Python code, which no "
            "exported file can hold; rewrite these modules without control flow that depends on values or lengths"
        )
    for name, tensor in compiled.graph_module.named_parameters():
        if tensor.device.type != "cpu":
            raise ExportError(f"{name} is on {tensor.device}; move the model to the CPU to export it")
        if tensor.dtype != torch.float32:
            raise ExportError(f"{name} is {tensor.dtype}; compile the model in float32 to export it")
