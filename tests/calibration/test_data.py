"""Token ids to fit on: checked, split so that nothing is both fitted on and measured."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linearize.calibration.data import checked_batches, held_out_split, split_rows
from linearize.errors import DataError


def numbered(shapes: list[tuple[int, int]]) -> list[torch.Tensor]:
    """Batches in which every token has its own number."""
    batches, start = [], 0
    for rows, length in shapes:
        batches.append(torch.arange(start, start + rows * length).reshape(rows, length))
        start += rows * length
    return batches


@given(shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(2, 6)), min_size=1, max_size=20))
def test_the_held_out_split_shares_no_token_and_loses_none(shapes: list[tuple[int, int]]) -> None:
    batches = numbered(shapes)
    train, held = held_out_split(batches)
    sets = [{int(token) for batch in part for token in batch.flatten()} for part in (train, held)]
    assert not sets[0] & sets[1]
    assert sets[0] | sets[1] == {int(token) for batch in batches for token in batch.flatten()}
    assert held
    assert sets[1]
    assert sum(batch.numel() for batch in train) >= sum(batch.numel() for batch in held) / 5 or len(batches) < 3


def test_a_batch_given_twice_is_not_both_fitted_on_and_held_out() -> None:
    """A short list repeated to have more of it, as the same object or as copies, and one with a row in common."""
    (batch,) = numbered([(4, 6)])
    other = torch.cat([batch[:1], batch[1:] + 100])
    for batches in ([batch] * 9, [batch.clone() for _ in range(9)], [batch, other, batch], [other, batch]):
        train, held = held_out_split(batches)
        rows = [{tuple(row.tolist()) for part in parts for row in part} for parts in (train, held)]
        assert rows[0]
        assert rows[1]
        assert not rows[0] & rows[1]


@given(rows=st.integers(1, 9), size=st.integers(1, 5))
def test_rows_are_split_without_loss(rows: int, size: int) -> None:
    (batch,) = numbered([(rows, 3)])
    parts = split_rows([batch], size)
    assert all(part.shape[0] <= size for part in parts)
    assert torch.equal(torch.cat(parts), batch)


def test_batches_are_read_until_there_are_enough_tokens() -> None:
    def endless():  # type: ignore[no-untyped-def]
        while True:
            yield torch.ones(2, 5, dtype=torch.int32)

    batches = checked_batches(endless(), vocab_size=3, tokens=25)
    assert len(batches) == 3
    assert all(batch.dtype == torch.int64 for batch in batches)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "the calibration data is empty"),
        ([torch.tensor([[0, 3]])], "token id 3 at row 0, position 1 is outside the vocabulary 0..2"),
        ([torch.tensor([[0, 1]]), torch.tensor([[0]])], "calibration batch 1 has sequences of one token"),
        ([torch.rand(1, 4)], "must be an integer tensor"),
        ([torch.zeros(4, dtype=torch.int64)], "must be an integer tensor"),
        ([None], "not NoneType"),
    ],
)
def test_batches_that_make_no_sense_are_named(batches: list, message: str) -> None:
    with pytest.raises(DataError, match=message):
        checked_batches(batches, vocab_size=3, tokens=100)
