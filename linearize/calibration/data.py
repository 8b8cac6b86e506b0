"""Token ids to fit on: checked, split by rows, and a part held out."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from linearize.errors import DataError
from linearize.runtime.tokens import check_tokens


def checked_batches(
    calibration: Iterable[Tensor], vocab_size: int | None, tokens: int, longest: int | None = None
) -> list[Tensor]:
    """int64 batches [B, T] from the user's iterable, until `tokens` tokens are there.

    Raises:
        DataError: no batch, one that is no int [B, T] with 2 <= T <= longest, or ids outside the vocabulary.
    """
    batches: list[Tensor] = []
    have = 0
    for batch in calibration:
        if have >= tokens:
            break
        try:
            check_tokens(batch, vocab_size)
        except DataError as error:
            raise DataError(f"calibration batch {len(batches)}: {error}") from error
        if batch.shape[1] < 2:
            raise DataError(f"calibration batch {len(batches)} has sequences of one token; nothing attends to anything")
        if longest is not None and batch.shape[1] > longest:
            raise DataError(
                f"calibration batch {len(batches)} has sequences of {batch.shape[1]} tokens, more than the source's "
                f"{longest} learned positions; cut them"
            )
        batches.append(batch.to(torch.int64))
        have += batch.numel()
    if not batches:
        raise DataError("the calibration data is empty: it yields no batch of token ids")
    return batches


def split_rows(batches: list[Tensor], size: int) -> list[Tensor]:
    """The same sequences in batches of at most `size` rows."""
    return [part for batch in batches for part in batch.split(size)]


def held_out_split(batches: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(to fit on, held out): of the batches of each row length every eighth, or the last of several, is never fitted
    on, nor is a row equal to one of its rows. A single batch is split by rows, and one single row by length, so that
    the two never share a token."""
    if len(batches) == 1:
        only = batches[0]
        dim = 0 if only.shape[0] > 1 else 1
        cut = max(1, only.shape[dim] * 7 // 8)
        first, second = only.split([cut, only.shape[dim] - cut], dim=dim)
        return ([first], [second]) if second.numel() else ([only], [only])
    lengths = dict.fromkeys(batch.shape[1] for batch in batches)
    chosen = {index for length in lengths for index in _chosen(batches, length)}
    chosen = chosen or {len(batches) - 1}
    held = [batch for index, batch in enumerate(batches) if index in chosen]
    measured = {_key(row) for batch in held for row in batch}
    train = [_without(batch, measured) for index, batch in enumerate(batches) if index not in chosen]
    train = [batch for batch in train if batch.numel()]
    return (train, held) if train else held_out_split(batches[:1])


def _chosen(batches: list[Tensor], length: int) -> list[int]:
    """Every eighth of those with rows of this length, so that each kind of row is measured on."""
    own = [index for index, batch in enumerate(batches) if batch.shape[1] == length]
    return own[7::8] or (own[-1:] if len(own) > 1 else [])


def _without(batch: Tensor, rows: set[bytes]) -> Tensor:
    kept = [index for index, row in enumerate(batch) if _key(row) not in rows]
    return batch if len(kept) == len(batch) else batch[kept]


def _key(row: Tensor) -> bytes:
    return row.cpu().numpy().tobytes()
