"""Weights as ONNX external data inside a safetensors file: one file that both worlds read, each range by its offset."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from linearize.errors import ArtifactError
from linearize.export.names import WEIGHTS_FILE

if TYPE_CHECKING:
    import onnx_ir as ir

DTYPES = {"FLOAT": "F32", "DOUBLE": "F64", "FLOAT16": "F16", "INT64": "I64", "INT32": "I32", "INT8": "I8",
          "UINT8": "U8", "BOOL": "BOOL"}  # fmt: skip
ALIGNED = 8  # bytes
SMALLEST = 1024  # bytes; shapes and scalars stay in the graph, where the runtime's constant folding sees them


def move_weights(model: ir.Model, folder: Path) -> None:
    """Write the graph's initialisers to `folder/model.safetensors`, each content once, and point the graph there."""
    import onnx_ir as ir

    values = {
        str(name): value
        for name, value in model.graph.initializers.items()
        if value.const_value is not None and value.const_value.nbytes >= SMALLEST
    }
    stored = first_of_each_content(values)
    path = folder / WEIGHTS_FILE
    kept = {name: value.const_value for name, value in values.items() if stored[name] == name}
    try:
        write_tensors(kept, path)  # type: ignore[arg-type]
    except OSError as error:
        raise ArtifactError(f"cannot write the weights beside {folder.parent}: {error.strerror or error}") from error
    ranges = read_ranges(path)
    for name, value in values.items():
        old, (offset, length) = value.const_value, ranges[stored[name]]
        assert old is not None
        assert length == old.nbytes
        shape = ir.Shape([int(size) for size in old.shape])  # type: ignore[arg-type]
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE, offset, length, old.dtype, shape=shape, name=name, base_dir=folder
        )


def write_tensors(tensors: dict[str, ir.TensorProtocol], path: Path) -> None:
    """A safetensors file, one tensor in memory at a time: transposed and joined weights are made then."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, tensor in tensors.items():
        shape = [int(size) for size in tensor.shape]  # type: ignore[arg-type]
        stop = start + tensor.nbytes
        header[name] = {"dtype": DTYPES[tensor.dtype.name], "shape": shape, "data_offsets": [start, stop]}
        start = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNED)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            file.write(contiguous(tensor).reshape(-1).view(np.uint8).data)


def first_of_each_content(values: dict[str, ir.Value]) -> dict[str, str]:
    """name -> the name under which the same bytes are stored, whatever their shape."""
    first: dict[tuple[int, bytes], str] = {}
    return {
        name: first.setdefault((value.const_value.nbytes, _digest(value.const_value)), name)  # type: ignore[union-attr]
        for name, value in values.items()
    }


def _digest(tensor: ir.TensorProtocol | None) -> bytes:
    return hashlib.sha256(contiguous(tensor).reshape(-1).view(np.uint8).data).digest()


def contiguous(tensor: ir.TensorProtocol | None) -> np.ndarray:
    assert tensor is not None
    return np.ascontiguousarray(tensor.numpy())


def read_ranges(path: Path) -> dict[str, tuple[int, int]]:
    """(offset in the file, bytes) of every tensor of a safetensors file."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    entries = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: (8 + size + start, stop - start) for name, (start, stop) in entries.items()}


def sha256(path: Path) -> str:
    """Of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
