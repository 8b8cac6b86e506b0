"""export(): everything is checked before the work, and what is written is checked before it is left behind."""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from linearize.errors import ArtifactError, ExportError
from linearize.export.names import CONTRIB, GRAPH_FILE, MANIFEST_FILE, NATIVE, PORTABLE, WEIGHTS_FILE
from linearize.export.ways import program_refusal
from linearize.export.weights import sha256
from linearize.files import check_new_directory, new_directory
from linearize.weights import give_memory_back

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from linearize.export.interface import Interface
    from linearize.export.manifest import Manifest
    from linearize.export.parity import Recorded
    from linearize.runtime.model import LinearizedModel

MARGIN = 16 << 20  # the graph, tokenizer files and manifest
QUANTIZE = ("int8", "int4", "web")
EXPECTED = ".expected"  # while a directory is being written: what PyTorch computes
Finish = Callable[[], None]
Writer = Callable[["LinearizedModel", Path, "Options"], Finish]  # what it returns needs the model no more


@dataclass(frozen=True)
class Options:
    """What `export` takes beyond the format; each format takes some of them."""

    portable: bool = False
    genai: bool = False
    quantize: str | None = None
    aoti: bool = False

    def given(self) -> list[str]:
        return [field.name for field in fields(self) if getattr(self, field.name)]


def export(
    compiled: LinearizedModel,
    directory: str | Path,
    format: str = "onnx",
    *,
    portable: bool = False,
    genai: bool = False,
    quantize: str | None = None,
    aoti: bool = False,
) -> Path:
    """Write a compiled model to a new directory in a format that runs without PyTorch.

    Args:
        compiled: what `linearize.compile` or `linearize.load` returned, on the CPU in float32.
        directory: must not exist, or be empty. It appears complete or not at all.
        format: "onnx": `model.onnx`, `model.safetensors`, `linearize.json`, tokenizer files. "torchscript": traces of
            one token and of a piece, deprecated upstream. "pt2": a torch.export archive. "pte": a program for
            ExecuTorch, with XNNPACK; needs the extra `executorch`.
        portable: standard ONNX operators only; without it, onnxruntime's own where it has one.
        quantize: "int8", "int4" (fast natively) or "web" (small, for wasm): weights in fewer bits, the loss measured.
        aoti: with "pt2", also a package compiled for this machine's CPU.
        genai: states as onnxruntime-genai carries them, and its `genai_config.json`.

    Returns:
        The directory.

    Raises:
        ExportError: not a compiled model, an unknown format, a model that cannot run step by step, an operator that
            the format cannot express, or a file that disagrees with PyTorch.
        ArtifactError: the directory exists or cannot be written.
    """
    return export_loaded(lambda: compiled, directory, format, Options(portable, genai, quantize, aoti))


def export_loaded(load: Callable[[], LinearizedModel], directory: str | Path, format: str, options: Options) -> Path:
    """`export` of what `load` returns, which is let go of as soon as only the file is needed: where nobody else holds
    the model, its memory is free before a runtime loads the file."""
    writer = _writer(format, options)
    check_new_directory(directory)
    compiled = load()
    check_exportable(compiled)
    check_room(compiled, Path(directory), options, expected_bytes(compiled) if format == "onnx" else 0)
    with new_directory(directory) as folder:
        finish = writer(compiled, folder, options)
        del compiled
        gc.collect()
        give_memory_back()
        finish()
    return Path(directory)


def _write_onnx(compiled: LinearizedModel, folder: Path, options: Options) -> Finish:
    from linearize.export import genai, loss, parity
    from linearize.export.manifest import describe, write_manifest
    from linearize.export.onnx import own_weights, write_onnx

    interface = _interface(compiled, options.genai, not options.portable)
    write_onnx(compiled, folder, interface, options.portable)
    _copy_files(compiled, folder)
    if isinstance(interface, genai.Packed):
        genai.write_config(compiled, interface, folder)
    manifest = describe(compiled, folder, interface, PORTABLE if options.portable else NATIVE)
    write_manifest(manifest, folder)  # unverified; the check reads it as a user would
    (folder / EXPECTED).mkdir()
    recorded = parity.record(compiled, interface, folder / EXPECTED)
    if options.quantize is None:
        return partial(_finish_onnx, folder, manifest, recorded)
    kept = [tensor.detach().clone() for tensor in own_weights(compiled)]
    quantized = partial(_quantize, loss.own_tokens(compiled), kept, folder, options.quantize)
    return partial(_finish_onnx, folder, manifest, recorded, quantized)


def _finish_onnx(
    folder: Path, manifest: Manifest, recorded: Recorded, quantized: Callable[[], dict[str, Any]] | None = None
) -> None:
    """Compare the file with what PyTorch said, quantise it where that is wanted, and complete the manifest."""
    from linearize.export.manifest import weights_entry, write_manifest
    from linearize.export.parity import check_recorded
    from linearize.export.probe import take_probe

    changes: dict[str, Any] = {"verified": check_recorded(recorded, folder)}
    shutil.rmtree(recorded.place)
    if quantized is not None:
        changes |= quantized()
        changes |= {"weights": weights_entry(folder), "graph_sha256": sha256(folder / GRAPH_FILE)}
        if changes["quantization"].kind != "web":
            changes |= {"flavour": NATIVE, "domains": manifest.domains | {CONTRIB: 1}}
    write_manifest(manifest.model_copy(update=changes | {"probe": take_probe(folder)}), folder)


def _interface(compiled: LinearizedModel, packed: bool, native: bool) -> Interface:
    from linearize.export.genai import Packed
    from linearize.export.interface import Compact

    return Packed(compiled) if packed else Compact(compiled, join=native)


def _quantize(ids: np.ndarray, kept: list[Tensor], folder: Path, kind: str) -> dict[str, Any]:
    """Quantise the directory in place, but for the weights `kept`; the manifest's entry, measured on `ids`."""
    from linearize.export.loss import measure_loss
    from linearize.export.onnx import write_quantized

    with tempfile.TemporaryDirectory(dir=folder) as place:
        before = Path(place)
        shutil.copy2(folder / MANIFEST_FILE, before)
        for name in (GRAPH_FILE, WEIGHTS_FILE):
            (folder / name).rename(before / name)
        count = write_quantized(kept, before, folder, kind)
        return {"quantization": measure_loss(ids, before, folder, kind, count)}


def compare(compiled: LinearizedModel, directory: str | Path) -> float:
    """The self-check of an exported directory against a compiled model, repeated: the largest difference of logits.

    Raises:
        ExportError: they disagree, or the directory is quantised and need not agree.
    """
    from linearize.export.manifest import read_manifest
    from linearize.export.parity import check_parity

    manifest = read_manifest(directory)
    if manifest.quantization is not None:
        kind = manifest.quantization.kind
        raise ExportError(f"{directory} is quantised ({kind}): it does not equal any model exactly")
    packed, native = any(entry.parts for entry in manifest.states), CONTRIB in manifest.domains
    interface = _interface(compiled, packed, native)
    names = [entry.input for entry in manifest.states]
    if names != [port.past for port in interface.ports]:
        raise ExportError(f"{directory} has other states than this compiled model: it is another model's")
    return check_parity(compiled, Path(directory), interface).largest_logit_difference


def _write_torchscript(compiled: LinearizedModel, folder: Path, options: Options) -> Finish:
    from linearize.export.torchscript import write_torchscript

    write_torchscript(compiled, folder)
    _copy_files(compiled, folder)
    return _nothing_left


def _write_pt2(compiled: LinearizedModel, folder: Path, options: Options) -> Finish:
    from linearize.export.pt2 import write_pt2

    write_pt2(compiled, folder, options.aoti)
    _copy_files(compiled, folder)
    return _nothing_left


def _write_pte(compiled: LinearizedModel, folder: Path, options: Options) -> Finish:
    from linearize.export.pte import write_pte

    write_pte(compiled, folder)
    _copy_files(compiled, folder)
    return _nothing_left


def _nothing_left() -> None:
    """The writer has checked what it wrote itself."""


def _copy_files(compiled: LinearizedModel, folder: Path) -> None:
    for name, content in compiled.files.items():
        (folder / name).write_bytes(content)


WRITERS: dict[str, tuple[Writer, set[str]]] = {
    "onnx": (_write_onnx, {"portable", "genai", "quantize"}),
    "pt2": (_write_pt2, {"aoti"}),
    "pte": (_write_pte, set()),
    "torchscript": (_write_torchscript, set()),
}


def _writer(format: str, options: Options) -> Writer:
    if format not in WRITERS:
        raise ExportError(f"no export format {format!r}; there are {', '.join(sorted(WRITERS))}")
    if options.quantize is not None and options.quantize not in QUANTIZE:
        raise ExportError(f"cannot quantize to {options.quantize!r}; there are {', '.join(QUANTIZE)}")
    writer, takes = WRITERS[format]
    alien = [name for name in options.given() if name not in takes]
    if alien:
        known = ", ".join(sorted(takes)) or "no option"
        raise ExportError(f"the format {format} does not take {alien[0]}; it takes {known}")
    return writer


def expected_bytes(compiled: LinearizedModel) -> int:
    """What `parity.record` leaves on the disk until it is compared."""
    from linearize.export.parity import BATCHES, LENGTHS

    states = sum(spec.zeros(1).nbytes for spec in compiled.state_specs)
    return logits_bytes(compiled.vocab_size or 2) + 2 * states * 2 * sum(BATCHES) * len(LENGTHS)


def logits_bytes(vocabulary: int) -> int:
    """The logits in it."""
    from linearize.export.parity import BATCHES, LENGTHS, PROMPT, STEPS

    rows = sum(BATCHES) + sum(batch for batch in BATCHES if batch > 1)  # those that are padded once more
    return 4 * vocabulary * (rows * sum(LENGTHS) + PROMPT + STEPS)


def check_room(compiled: LinearizedModel, directory: Path, options: Options, expected: int = 0) -> None:
    """Refuse before the work what the disk has no room for: the weights, twice where both forms lie there for a while,
    and `expected` bytes more.

    Raises:
        ArtifactError: naming what is needed and what is free.
    """
    place = directory
    while not place.exists():
        place = place.parent
    copies = 2 if options.quantize is not None or options.aoti else 1
    needed = MARGIN + expected + copies * sum(tensor.nbytes for tensor in compiled.graph_module.state_dict().values())
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ArtifactError(
            f"{place} has {free / 2**20:,.0f} MiB free, and exporting needs about {needed / 2**20:,.0f}; "
            "nothing was written"
        )


def check_exportable(compiled: object) -> None:
    """Refuse what could not be written, before any work.

    Raises:
        ExportError: see `export`.
    """
    from linearize.runtime.model import LinearizedModel

    if not isinstance(compiled, LinearizedModel):
        raise ExportError(
            f"export takes what linearize.compile or linearize.load returns, not a {type(compiled).__name__}"
        )
    refusal = program_refusal(compiled.program)
    if refusal is not None:
        raise ExportError(refusal)
    for name, tensor in compiled.graph_module.named_parameters():
        if tensor.device.type != "cpu":
            raise ExportError(f"{name} is on {tensor.device}; move the model to the CPU to export it")
