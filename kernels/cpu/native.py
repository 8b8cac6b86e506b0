"""C sources of this folder, compiled on first use by the machine's own C compiler and kept in the user's cache.

Nothing here is needed: what a C function computes, torch operators compute too, more slowly; `LINEARIZE_NATIVE=0` does
without it. The library's name has the hash of its source, so an old one is never loaded for a new source.
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
from pathlib import Path

FLAGS = (
    "-O3",
    "-march=native",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fno-strict-aliasing",
    "-shared",
    "-fPIC",
    "-std=c99",
)


@functools.cache
def library(name: str) -> ctypes.CDLL | None:
    """The compiled `<name>.c`, or None where there is no compiler, it fails, or the environment says no."""
    compiler = os.environ.get("CC") or shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if os.environ.get("LINEARIZE_NATIVE") == "0" or compiler is None:
        return None
    source = Path(__file__).with_name(f"{name}.c")
    try:
        return ctypes.CDLL(str(_built(compiler, source)))
    except (OSError, subprocess.SubprocessError):
        return None


def _built(compiler: str, source: Path) -> Path:
    """The library of a source; written under a temporary name and renamed, so that no process sees half of one."""
    text = source.read_bytes()
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
