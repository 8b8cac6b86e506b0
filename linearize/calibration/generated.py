"""Rows made on the fly, of which the right continuation can only be found far back.

    recall   segments that come again, and key-value pairs that are asked for, in rows of the usual length
    long     a key hidden at the beginning of rows `LONGER` times as long, and asked for at their end

What lies between is text of the other sources where there is some, else random tokens. Distances are spread evenly by
their logarithm, so that near and far are seen alike.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from linearize.calibration.recall import RecallBatch, cat_batches, key_value_pairs, passkey, repeated_segments
from linearize.errors import DataError

LONGER = 4
SHORTEST = 24  # tokens: a key of MARKER + DIGITS twice, and a gap
MARKER, DIGITS = 3, 5
FEWEST = 2 * (MARKER + DIGITS)  # different ids, so that a key is not all of the text


def recall_rows(count: int, length: int, text: Tensor, generator: torch.Generator) -> RecallBatch:
    """`count` rows; the odd ones ask for values by keys. `text`: int64 [any], what lies between, and the ids used.

    Raises:
        DataError: rows are too short to recall anything in.
    """
    return _rows(count, length, text, generator, pairs=True)


def long_rows(count: int, length: int, text: Tensor, generator: torch.Generator) -> RecallBatch:
    """`count` rows with a key to find again. Raises as `recall_rows`."""
    return _rows(count, length, text, generator, pairs=False)


def _rows(count: int, length: int, text: Tensor, generator: torch.Generator, pairs: bool) -> RecallBatch:
    if length < SHORTEST:
        raise DataError(f"rows of {length} tokens are too short to recall anything in; they need {SHORTEST}")
    ids = text.unique()
    if len(ids) < FEWEST:
        raise DataError(f"the text has {len(ids)} different tokens, too few to tell what is recalled; add other text")
    places = torch.searchsorted(ids, text)
    known = (0, len(ids))
    made = []
    for row in range(count):
        filler = _window(places, length, generator)
        low, high = 2 * (MARKER + DIGITS), length - 1 - (MARKER + DIGITS)
        back = round(low * (high / low) ** _share(row, count, generator))
        if not pairs:
            made.append(passkey(1, length, token_range=known, distance=(back, back), marker=MARKER, digits=DIGITS,
                                filler=filler, generator=generator))  # fmt: skip
        elif row % 2:
            number = max(1, min(length // 24, len(ids) // 2 - 1))
            made.append(key_value_pairs(1, length, token_range=known, n_pairs=number, filler=filler,
                                        generator=generator))  # fmt: skip
        else:
            size = max(4, min(back // 2, length // 8))
            gap = max(0, back - size)
            made.append(repeated_segments(1, length, token_range=known, segment=(size, size), gap=(gap, gap),
                                          filler=filler, generator=generator))  # fmt: skip
    batch = cat_batches(made)
    return RecallBatch(ids[batch.input_ids], batch.mask, batch.distance)


def _share(row: int, count: int, generator: torch.Generator) -> float:
    """In [0, 1], the rows spread evenly."""
    return (row + float(torch.rand(1, generator=generator))) / count


def _window(places: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """A piece of the text, int64 [1, length], from a random place; repeated where the text is shorter."""
    start = int(torch.randint(0, len(places), (1,), generator=generator))
    return places.roll(-start).repeat(math.ceil(length / len(places)))[None, :length]


def distances_of(batch: RecallBatch) -> tuple[int, int, int] | None:
    """(smallest, median, largest) distance to look back; None where nothing is recalled."""
    found = batch.distance[batch.mask]
    return (int(found.min()), int(found.median()), int(found.max())) if found.numel() else None
