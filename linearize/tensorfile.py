"""Safetensors files read and written piece by piece, so that no file has to fit in memory.

A file is 8 bytes n (little endian), n bytes of JSON {name: {dtype, shape, data_offsets}}, then the tensors' bytes.
No file is mapped: a mapping counts in full against a limit on address space, a read only by its own size.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.errors import ArtifactError

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64,
    "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
OWN_PAGES = 1 << 20  # bytes


@dataclass(frozen=True)
class Stored:
    """Where one tensor stands in a file."""

    path: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class Planned:
    """A tensor that is made when its turn to be written has come."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        return bytes_of(self.dtype, self.shape)

    @staticmethod
    def of(tensor: Tensor) -> Planned:
        return Planned(tensor.dtype, tuple(tensor.shape), lambda: tensor)


def bytes_of(dtype: torch.dtype, shape: Iterable[int]) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count


def read_header(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """(where each tensor stands, the file's metadata).

    Raises:
        ArtifactError: the file cannot be read, or is no safetensors file.
    """
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= LONGEST_HEADER:
                raise ValueError("no header")
            rows: dict[str, Any] = json.loads(file.read(length))
            size = path.stat().st_size
        metadata = rows.pop("__metadata__", {})
        found = {name: _stored(path, row, 8 + length) for name, row in rows.items()}
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ArtifactError(f"{path} is damaged: not a safetensors file ({error})") from error
    if any(one.start + one.nbytes > size for one in found.values()):
        raise ArtifactError(f"{path} is damaged: it ends before its last tensor")
    return found, metadata


def _stored(path: Path, row: dict[str, Any], base: int) -> Stored:
    first, stop = row["data_offsets"]
    dtype, shape = DTYPES[row["dtype"]], tuple(row["shape"])
    if stop - first != bytes_of(dtype, shape):
        raise ValueError("a tensor's bytes are not those of its shape")
    return Stored(path, dtype, shape, base + first, stop - first)


def read_tensor(stored: Stored) -> Tensor:
    """One tensor, in memory of its own.

    Raises:
        ArtifactError: it cannot be read.
    """
    tensor = _empty(stored)
    if stored.nbytes:
        _read_into(stored, memoryview(tensor.reshape(-1).view(torch.uint8).numpy()))  # type: ignore[arg-type]
    return tensor


def _empty(stored: Stored) -> Tensor:
    """A large one has pages of its own, which go back to the system with it. In the heap, tensors that are read and let
    go of leave holes that the next one does not fit in: a walk over 48 layers took a quarter more memory."""
    if stored.nbytes < OWN_PAGES or not hasattr(mmap, "MAP_PRIVATE"):
        return torch.empty(stored.shape, dtype=stored.dtype)
    pages = mmap.mmap(-1, stored.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(pages, dtype=torch.uint8).view(stored.dtype).reshape(stored.shape)


def _read_into(stored: Stored, view: memoryview) -> None:
    try:
        with stored.path.open("rb", buffering=0) as file:
            file.seek(stored.start)
            done = 0
            while done < stored.nbytes:
                count = file.readinto(view[done:])
                if not count:
                    raise ArtifactError(f"{stored.path} is damaged: it ends before its last tensor")
                done += count
    except OSError as error:
        raise ArtifactError(f"cannot read {stored.path}: {error.strerror or error}") from error


def write_tensors(path: Path, tensors: dict[str, Planned], metadata: dict[str, str]) -> Path:
    """A whole file or none, one tensor in memory at a time.

    Raises:
        ArtifactError: it cannot be written (a full disk, for one); nothing half-written is left.
    """
    temporary = ""
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(_header(tensors, metadata))
            for planned in tensors.values():
                if planned.nbytes:
                    file.write(_bytes(planned))
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return path


def _header(tensors: dict[str, Planned], metadata: dict[str, str]) -> bytes:
    rows: dict[str, Any] = {"__metadata__": metadata} if metadata else {}
    offset = 0
    for name, planned in tensors.items():
        stop = offset + planned.nbytes
        rows[name] = {"dtype": NAMES[planned.dtype], "shape": list(planned.shape), "data_offsets": [offset, stop]}
        offset = stop
    text = json.dumps(rows, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _bytes(planned: Planned) -> memoryview:
    tensor = planned.make().detach().cpu().contiguous()
    if tensor.dtype != planned.dtype or tuple(tensor.shape) != planned.shape:
        raise ArtifactError(f"a tensor of {planned.shape} was to be written, and {tuple(tensor.shape)} came")
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
