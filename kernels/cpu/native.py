"""C sources of this folder, compiled on first use by the machine's own C compiler and kept in the user's cache.

Nothing here is needed: what a C function computes, torch operators compute too, more slowly; `LINEARIZE_NATIVE=0` does
without it. The library's name has the hash of its source and of the headers: an old one is never loaded for a new one.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.ops._library import OperatorError

FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp-simd",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
    "-std=c99",
)


@functools.cache
def load(name: str) -> ctypes.CDLL | str:
    """The compiled `<name>.c`, or why there is none."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("LINEARIZE_NATIVE") == "0":
        return "LINEARIZE_NATIVE is 0"
    if compiler is None:
        return "no C compiler: cc, gcc or clang, or CC in the environment"
    source = Path(__file__).with_name(f"{name}.c")
    try:
        return ctypes.CDLL(str(_built(compiler, source)))
    except (OSError, subprocess.SubprocessError) as error:
        return f"{compiler} could not make {source.name}: {error}"


def library(name: str) -> ctypes.CDLL | None:
    """The compiled `<name>.c`, or None where there is no compiler, it fails, or the environment says no."""
    found = load(name)
    return None if isinstance(found, str) else found


def missing(name: str) -> str:
    """Why there is no `<name>.c` here, "" where there is."""
    found = load(name)
    return found if isinstance(found, str) else ""


def _built(compiler: str, source: Path) -> Path:
    """The library of a source; written under a temporary name and renamed, so that no process sees half of one."""
    text = b"".join(path.read_bytes() for path in (source, *sorted(source.parent.glob("*.h"))))
    key = hashlib.sha256(text + " ".join((compiler, platform.node(), *FLAGS)).encode()).hexdigest()[:16]
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linearize"
    made = folder / f"{source.stem}-{key}.so"
    if made.exists():
        return made
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        target = Path(scratch, made.name)
        command = [*compiler.split(), *FLAGS, str(source), "-o", str(target)]
        subprocess.run(command, check=True, capture_output=True, timeout=60)
        target.replace(made)
    return made


def run(function: Any, tensors: Sequence[Tensor | None], sizes: Sequence[int], reals: Sequence[float] = ()) -> int:
    """Call a function of a library as `vector.h` says: pointers (NULL for None), int64 sizes, doubles. Its int."""
    pointers = [None if tensor is None else tensor.data_ptr() for tensor in tensors]
    status: int = function(
        (ctypes.c_void_p * len(pointers))(*pointers),
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_double * len(reals))(*reals),
    )
    return status


def plain(tensor: Tensor | None) -> Tensor | None:
    """The tensor as C reads it: contiguous, floats as float32."""
    if tensor is None:
        return None
    if tensor.is_floating_point() and tensor.dtype is not torch.float32:
        tensor = tensor.to(torch.float32)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def expect(operator: str, given: Sequence[tuple[Tensor | None, tuple[int, ...]]]) -> None:
    """Raise `OperatorError` unless every tensor that is there has its shape: C looks at pointers alone."""
    for place, (tensor, shape) in enumerate(given):
        if tensor is not None and tensor.shape != shape:
            found = f"argument {place + 1} has shape {list(tensor.shape)}"
            raise OperatorError(f"linearize::{operator}: {found}, where the others make it {list(shape)}")
