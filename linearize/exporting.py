"""export_directory(): `export` of a saved model with at no time two copies of its weights in memory.

    forecast -> load (weights stay mapped from their file) -> write the graph, and the weights tensor by tensor
    -> PyTorch's side of the comparison, into files -> the model is let go of -> onnxruntime's side

    memory = the process now + libraries and the graph
             + weights once (mapped, or onnxruntime's own)
             + the largest tensors, while they are laid out anew + activations and logits of the comparison
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from linearize.api import load
from linearize.calibration.limits import free_disk, free_memory, used_memory
from linearize.errors import ArtifactError, DataError
from linearize.export.parity import BATCHES, LENGTHS
from linearize.export.write import MARGIN, Options, export_loaded, logits_bytes
from linearize.files import check_new_directory
from linearize.printing import bytes_text
from linearize.runtime.saving import GRAPH, WEIGHTS, read_manifest
from linearize.tensorfile import Stored, read_header

LIBRARIES = 180 << 20  # torch.onnx, onnxscript and onnxruntime, where they are not loaded yet
NODE = 160 << 10  # the exporter's objects for one node of the saved graph
LAID_OUT, ROUNDED = 3, 7  # of the largest tensor: joined, transposed, written; and while it is quantised
ACTIVATIONS = 12  # numbers a token and column of the widest matrix, at the worst moment of a call
QUANTISED = 1.35  # weights in both forms
SLACK, MARGINAL = 64 << 20, 1.05


@dataclass(frozen=True)
class ExportForecast:
    """Bytes. `memory` includes what the process has now, `taken`."""

    memory: int
    disk: int
    taken: int
    weights: int

    def __str__(self) -> str:
        return (
            f"needs about {bytes_text(self.memory)} of memory ({bytes_text(self.taken)} of it taken already, weights "
            f"{bytes_text(self.weights)}) and {bytes_text(self.disk)} of disk"
        )


def export_directory(
    source: str | Path,
    output: str | Path,
    format: str = "onnx",
    *,
    portable: bool = False,
    genai: bool = False,
    quantize: str | None = None,
    aoti: bool = False,
    memory: int | None = None,
    say: Callable[[str], None] | None = None,
) -> Path:
    """Export what `linearize compile` or `save_pretrained` wrote. Its weights are in memory once at most.

    Args:
        source: the saved model's directory.
        output, format, portable, genai, quantize, aoti: as for `linearize.export`.
        memory: bytes that this process may take, for the format onnx; None for what the machine and its limits leave.
        say: gets the forecast in one line, before the work; None prints it to stderr.

    Returns:
        `output`.

    Raises:
        DataError: it cannot be done in this memory or on this disk.
        ArtifactError, ExportError: as `linearize.load` and `linearize.export`.
    """
    target, options = Path(output), Options(portable, genai, quantize, aoti)
    check_new_directory(target)
    if format == "onnx":
        found = forecast(Path(source), options)
        (say or _print)(f"exporting {found}")
        check_fits(found, memory, target.absolute().parent)
    elif memory is not None:
        raise DataError(f"what exporting to {format} takes is not known before it starts; leave the limit out")
    return export_loaded(lambda: load(source), target, format, options)


def forecast(source: Path, options: Options) -> ExportForecast:
    """For the ONNX of a saved model.

    Raises:
        ArtifactError: it is no saved model.
    """
    stored, nodes, vocabulary = _read(source)
    weights = sum(one.nbytes for one in stored.values())
    largest = max((one.nbytes for one in stored.values()), default=0)
    sides = {max(one.shape) for one in stored.values() if len(one.shape) == 2} - {vocabulary}
    activations = _activations(vocabulary, max(sides, default=vocabulary))
    taken = used_memory()
    held = int(weights * (QUANTISED if options.quantize else 1))
    copies = ROUNDED if options.quantize else LAID_OUT
    working = LIBRARIES + NODE * nodes + held + copies * largest + activations
    disk = MARGIN + weights * (2 if options.quantize else 1) + logits_bytes(vocabulary)
    return ExportForecast(int((taken + working) * MARGINAL) + SLACK, disk, taken, weights)


def _read(source: Path) -> tuple[dict[str, Stored], int, int]:
    """(the tensors, the number of nodes, that of the vocabulary)."""
    vocabulary = read_manifest(source).vocab_size or 2
    try:
        rows = json.loads((source / GRAPH).read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read {source / GRAPH}: {error.strerror or error}") from error
    except ValueError as error:
        raise ArtifactError(f"{source / GRAPH} is damaged: not JSON ({error})") from error
    return read_header(source / WEIGHTS)[0], len(rows), vocabulary


def _activations(vocabulary: int, widest: int) -> int:
    """Of the largest call of the comparison: its logits thrice (two to compare, one copy), and what runs beside."""
    return 4 * max(BATCHES) * max(LENGTHS) * (3 * vocabulary + ACTIVATIONS * widest)


def check_fits(found: ExportForecast, memory: int | None, folder: Path) -> None:
    """Refuse before the work what cannot be done.

    Raises:
        DataError: memory or disk is short; it says how much there is.
    """
    free = used_memory() + free_memory()
    limit = free if memory is None else min(memory, free)
    if found.memory > limit:
        raise DataError(f"exporting {found}, and there are {bytes_text(limit)} of memory; give it more")
    if found.disk > free_disk(folder):
        raise DataError(f"exporting {found}, and {folder} has {bytes_text(free_disk(folder))} of disk free")


def _print(line: str) -> None:
    print(line, file=sys.stderr)
