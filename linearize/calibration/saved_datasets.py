"""Texts of Hugging Face datasets: folders that `save_to_disk` wrote, and datasets of the hub, read as a stream.

`datasets` is an extra: `pip install 'linearize[data]'`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from linearize.errors import DataError

MARKS = ("state.json", "dataset_dict.json")


def is_saved(path: Path) -> bool:
    """Whether a folder is one that `save_to_disk` wrote."""
    return path.is_dir() and any((path / mark).is_file() for mark in MARKS)


def saved_texts(path: Path, split: str, field: str) -> Iterator[str]:
    """The texts of a saved dataset, or of one of its splits ("" takes `train`, or the only one).

    Raises:
        DataError: `datasets` is missing, the folder is damaged, or it has no such split or field.
    """
    try:
        found = _library(path).load_from_disk(str(path))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot read the dataset {path}: {_first_line(error)}") from error
    return _texts(_split(found, split, str(path)), field, str(path))


def hub_texts(name: str, config: str, split: str, field: str) -> Iterator[str]:
    """The texts of a dataset of the hub, of which no more is fetched than is read.

    Raises:
        DataError: `datasets` is missing, there is no such dataset, or the hub cannot be reached.
    """
    library = _library(name)
    try:
        found = library.load_dataset(name, config or None, split=split or "train", streaming=True)
        yield from _texts(found, field, name)
    except DataError:
        raise
    except Exception as error:  # the hub's client raises its own kinds, and those of three libraries below it
        raise DataError(f"cannot read the dataset {name} from the hub: {_first_line(error)}") from error


def _library(name: object) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise DataError(f"{name} is a dataset, which needs the library: pip install 'linearize[data]'") from error
    datasets.disable_progress_bars()
    return datasets


def _split(found: Any, split: str, name: str) -> Any:
    if not isinstance(found, dict):
        if split:
            raise DataError(f"{name} was saved without splits, so it has no {split!r}")
        return found
    wanted = split or ("train" if "train" in found or len(found) != 1 else next(iter(found)))
    if wanted not in found:
        raise DataError(f"{name} has no split {wanted!r}; it has {', '.join(sorted(found))} (write {name}@split)")
    return found[wanted]


def _texts(rows: Any, field: str, name: str) -> Iterator[str]:
    for number, row in enumerate(rows):
        text = row.get(field)
        if not isinstance(text, str):
            raise DataError(f"{name}, row {number}: no text in the field {field!r}; it has {', '.join(sorted(row))}")
        yield text


def _first_line(error: Exception) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
