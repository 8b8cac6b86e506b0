"""Weights as ONNX external data inside a safetensors file: one file that both worlds read, each range by its offset."""

from __future__ import annotations

import hashlib
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from linearize.errors import ArtifactError
from linearize.export.names import WEIGHTS_FILE

if TYPE_CHECKING:
    import onnx_ir as ir

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
    tensors = {name: _as_torch(value.const_value) for name, value in values.items() if stored[name] == name}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:
        raise ArtifactError(f"cannot write the weights beside {folder.parent}: {error}") from error
    path.chmod(0o644)
    ranges = read_ranges(path)
    for name, value in values.items():
        old, (offset, length) = value.const_value, ranges[stored[name]]
        assert old is not None
        assert length == old.nbytes
        shape = ir.Shape([int(size) for size in old.shape])  # type: ignore[arg-type]
        value.const_value = ir.ExternalTensor(
            WEIGHTS_FILE, offset, length, old.dtype, shape=shape, name=name, base_dir=folder
        )


def first_of_each_content(values: dict[str, ir.Value]) -> dict[str, str]:
    """name -> the name under which the same bytes are stored, whatever their shape."""
    first: dict[tuple[int, bytes], str] = {}
    return {
        name: first.setdefault((value.const_value.nbytes, _digest(value.const_value)), name)  # type: ignore[union-attr]
        for name, value in values.items()
    }


def _digest(tensor: ir.TensorProtocol | None) -> bytes:
    return hashlib.sha256(_as_torch(tensor).reshape(-1).view(torch.uint8).numpy().data).digest()


def _as_torch(tensor: ir.TensorProtocol | None) -> torch.Tensor:
    assert tensor is not None
    raw = getattr(tensor, "raw", None)
    if isinstance(raw, torch.Tensor):
        return raw.detach().contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a mapped file is read-only, and nobody writes here
        return torch.from_numpy(np.asarray(tensor.numpy(), order="C"))


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
