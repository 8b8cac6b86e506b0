"""Writing so that a reader finds all or nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from linearize.errors import ArtifactError


def write_atomically(path: Path, content: bytes) -> Path:
    """Write a file under a temporary name beside it and rename it into place.

    Raises:
        ArtifactError: the folder is missing or cannot be written.
    """
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except OSError as error:
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
    return path


@contextlib.contextmanager
def new_directory(directory: str | Path) -> Iterator[Path]:
    """A directory that exists complete or not at all: fill the yielded temporary one, it is renamed at the end.

    Raises:
        ArtifactError: `directory` exists and is not an empty directory, or its parent cannot be written.
    """
    target = Path(directory)
    check_new_directory(target)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from error
    try:
        yield temporary
        os.chmod(temporary, 0o755)
        os.replace(temporary, target)  # onto nothing, or onto an empty directory
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def check_new_directory(directory: str | Path) -> None:
    """Fail before the work, not after it, when a result could not be written to `directory`.

    Raises:
        ArtifactError: something is there already, or the nearest existing parent is no writable directory.
    """
    target = Path(directory)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ArtifactError(f"{target} exists already; choose another output, or remove it first")
    parent = target.parent
    while not parent.exists() and parent != parent.parent:
        parent = parent.parent
    if not parent.is_dir():
        raise ArtifactError(f"cannot write {target}: {parent} is not a directory")
    try:  # not os.access: it says yes to root where nobody can write
        os.rmdir(tempfile.mkdtemp(dir=parent, prefix=f".{target.name}."))
    except OSError as error:
        raise ArtifactError(f"cannot write {target}: {error.strerror or error} in {parent}") from error
