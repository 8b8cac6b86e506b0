"""What the embedded model is measured on: text that every Python carries, and recall beyond a window.

The text is the part of the standard library that `tools/train_demo_model.py` holds out, chosen by the same hash of the
file's name, so nothing here was seen in training. Recall sequences are drawn as in training, from another seed.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.calibration.recall import RecallBatch, key_value_pairs, repeated_segments
from linearize.errors import DataError

HOLD_OUT_PER_MILLE = 30
SKIP_DIRS = {"site-packages", "dist-packages", "test", "tests", "idlelib", "encodings", "turtledemo", "_bundled"}
SKIP_PREFIXES = ("_sysconfigdata", "config-")
SPECIAL_TOKENS = 3  # ids below are BOS, EOS, PAD; recall symbols are drawn from those above
FARTHEST = 400
PAIRS = ((80, 8), (144, 12), (288, 20), (448, 32))  # (length of the row, key-value pairs in it)


def held_out_documents(root: Path | None = None) -> list[str]:
    """The held-out files of the standard library below `root` (this Python's), in the order of their names.

    Raises:
        DataError: none is there, as in a Python without its sources.
    """
    folder = root if root is not None else Path(sysconfig.get_paths()["stdlib"])
    names = sorted(path.relative_to(folder) for path in folder.rglob("*.py"))
    held = [name for name in names if _wanted(name) and _bucket(name) < HOLD_OUT_PER_MILLE]
    if not held:
        raise DataError(f"{folder} holds no standard library sources to measure on")
    return [(folder / name).read_text(encoding="utf-8", errors="replace").strip("\n") + "\n" for name in held]


def _wanted(name: Path) -> bool:
    return not any(part in SKIP_DIRS or part.startswith(SKIP_PREFIXES) for part in name.parts)


def _bucket(name: Path) -> int:
    return int(hashlib.sha256(name.as_posix().encode()).hexdigest(), 16) % 1000


def text_rows(tokenizer: Any, documents: Sequence[str], rows: int, length: int) -> Tensor:
    """int64 [rows, length]: BOS, then windows of the documents' text that do not overlap, spread evenly over it.

    Raises:
        DataError: the documents are too short for that many rows.
    """
    bos, eos, body = tokenizer.bos_token_id, tokenizer.eos_token_id, length - 1
    ids = [token for text in documents for token in [*tokenizer(text, verbose=False)["input_ids"], eos]]
    windows = torch.tensor(ids[: len(ids) // body * body], dtype=torch.int64).reshape(-1, body)
    if len(windows) < rows:
        raise DataError(f"the held-out text gives {len(windows)} rows of {length} tokens, not {rows}")
    chosen = windows[torch.arange(rows) * len(windows) // rows]
    return torch.cat([torch.full((rows, 1), bos), chosen], dim=1)


def recall_batches(vocab_size: int, window: int, rows: int, seed: int) -> list[RecallBatch]:
    """Repeated segments and key-value pairs whose answers stand `window` + 1 to 400 tokens back, context 512 or less.

    Segments touch, one batch for each range of `recall_edges`, or have random symbols between their copies; key-value
    pairs are asked for once after random filler, in four lengths. So every distance occurs.
    """
    generator = torch.Generator().manual_seed(seed)
    common: dict[str, Any] = {"token_range": (SPECIAL_TOKENS, vocab_size), "generator": generator}
    ranges = [(low, min(high - 1, 255)) for low, high in pairwise(recall_edges(window))]
    touching = [repeated_segments(rows, 512, segment=bounds, **common) for bounds in ranges]
    apart = repeated_segments(rows, 512, segment=(16, 64), gap=(window, FARTHEST - 64), **common)
    pairs = [key_value_pairs(rows, length, n_pairs=count, **common) for length, count in PAIRS]
    return [*touching, apart, *pairs]


def recall_edges(window: int) -> list[int]:
    """Bounds of the distances to report: from just beyond the window, doubling, to 400."""
    edges = [window + 1]
    while 2 * (edges[-1] - 1) + 1 <= FARTHEST // 2 + 1:
        edges.append(2 * (edges[-1] - 1) + 1)
    return [*edges, FARTHEST + 1]
