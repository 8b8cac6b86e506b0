"""What counts as token ids, wherever they come in."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from linearize.errors import DataError
from linearize.program import TOKENS


def check_tokens(input_ids: Any, vocab_size: int | None) -> None:
    """int [B, T] with T >= 1, ids in the vocabulary.

    Raises:
        DataError: naming the first id that is out of range and where it stands.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim != 2 or input_ids.is_floating_point():
        what = (
            f"{list(input_ids.shape)} {input_ids.dtype}" if isinstance(input_ids, Tensor) else type(input_ids).__name__
        )
        raise DataError(f"{TOKENS} must be an integer tensor [batch, length], not {what}")
    if input_ids.numel() == 0:
        raise DataError(f"{TOKENS} is empty: shape {list(input_ids.shape)}; at least one token is needed")
    bad = (input_ids < 0) | (input_ids >= vocab_size) if vocab_size is not None else None
    if bad is not None and bool(bad.any()):
        row, column = bad.nonzero()[0].tolist()
        raise DataError(
            f"token id {int(input_ids[row, column])} at row {row}, position {column} is outside the vocabulary "
            f"0..{vocab_size - 1}; was another tokenizer used?"  # type: ignore[operator]
        )
