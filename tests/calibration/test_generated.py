"""Rows made on the fly: right, at all distances, mixed with text, and in both parts of the split."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from linearize.calibration.data import held_out_split
from linearize.calibration.generated import LONGER, distances_of, long_rows, recall_rows
from linearize.calibration.sources import Source, TextRows, parse_source, read_mixture
from linearize.errors import DataError


class Letters:
    """A tokenizer of single letters."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) for letter in text]}

    def __len__(self) -> int:
        return 128


TEXT = torch.randint(30, 90, (900,), generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("make", [recall_rows, long_rows])
def test_what_is_to_be_recalled_stands_where_it_is_said(make: object) -> None:
    batch = make(24, 96, TEXT, torch.Generator().manual_seed(0))  # type: ignore[operator]
    assert batch.input_ids.shape == (24, 96)
    assert set(batch.input_ids.unique().tolist()) <= set(TEXT.unique().tolist())
    assert bool(batch.mask.any(1).all())
    for row, position in batch.mask.nonzero().tolist():
        back = int(batch.distance[row, position])
        assert batch.input_ids[row, position + 1] == batch.input_ids[row, position + 1 - back]


def test_distances_reach_from_near_to_the_whole_row() -> None:
    found = distances_of(long_rows(64, 256, TEXT, torch.Generator().manual_seed(0)))
    assert found is not None
    low, middle, high = found
    assert low < 24
    assert 40 < middle < 120  # about the geometric mean
    assert high > 200


def test_rows_too_short_to_recall_in_are_told() -> None:
    with pytest.raises(DataError, match="rows of 16 tokens are too short to recall anything in"):
        recall_rows(2, 16, TEXT, torch.Generator())


def test_text_of_too_few_tokens_to_recall_is_told() -> None:
    with pytest.raises(DataError, match="the text has 2 different tokens, too few"):
        recall_rows(2, 48, torch.tensor([4, 5, 4]), torch.Generator())


def mixture(tmp_path: Path, *names: str, limit: int | None = None) -> TextRows:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 200)
    sources = [parse_source(name.replace("TEXT", str(tmp_path / "text.txt"))) for name in names]
    return read_mixture(sources, Letters(), 48, 6144, 4, limit=limit, vocabulary=128)


def test_text_recall_and_long_rows_are_mixed_by_weight_and_reported(tmp_path: Path) -> None:
    data = mixture(tmp_path, "TEXT=2", "recall", "long")
    tokens = {length: sum(b.numel() for b in data if b.shape[1] == length) for length in (48, 48 * LONGER)}
    assert tokens[48] == pytest.approx(6144 * 3 / 4, rel=0.05)
    assert tokens[48 * LONGER] == pytest.approx(6144 / 4, rel=0.05)
    assert max(batch.numel() for batch in data) == 4 * 48
    *shards, whole = data.report()
    assert [shard.split(" (")[0] for shard in shards] == ["text.txt", "recall", "long"]
    assert "recalled from " in shards[1]
    assert "of the vocabulary's 128" in whole
    assert "rows of 48, 192" in whole
    assert data.description == ", ".join(shards)


def test_every_kind_of_row_is_fitted_on_and_held_out(tmp_path: Path) -> None:
    data = mixture(tmp_path, "TEXT=2", "recall", "long")
    train, held = held_out_split(list(data))
    for part in (train, held):
        assert {batch.shape[1] for batch in part} == {48, 192}
    rows = [{tuple(row.tolist()) for batch in part for row in batch} for part in (train, held)]
    assert not rows[0] & rows[1]


def test_long_rows_stay_within_the_models_positions(tmp_path: Path) -> None:
    assert {batch.shape[1] for batch in mixture(tmp_path, "TEXT", "long", limit=100)} == {48, 100}


def test_without_text_ids_are_drawn_from_the_vocabulary(tmp_path: Path) -> None:
    data = mixture(tmp_path, "recall")
    assert torch.cat(list(data)).unique().numel() > 100
    assert torch.equal(torch.cat(list(data)), torch.cat(list(mixture(tmp_path, "recall"))))


def test_a_tokenizer_of_another_model_is_told(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("abc~" * 20)
    with pytest.raises(DataError, match=r"text.txt gives token id 126, outside the model's vocabulary 0\.\.119"):
        read_mixture([Source(tmp_path / "text.txt")], Letters(), 8, 64, 2, vocabulary=120)


def test_documents_of_one_token_are_packed(tmp_path: Path) -> None:
    (tmp_path / "notes.jsonl").write_text('"a"\n"b"\n"c"\n"d"\n')
    data = read_mixture([Source(tmp_path / "notes.jsonl")], Letters(), 4, 100, 2)
    assert torch.cat(list(data)).tolist() == [[97, 0, 98, 0]]
