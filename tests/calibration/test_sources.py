"""Text from files, JSON lines and folders, packed and mixed; what cannot be used is named."""

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linearize.calibration.sources import Source, documents, evenly, parse_source, read_mixture, read_rows
from linearize.errors import DataError

ALPHABET = "abcdefghijklmnopqrstuvwxyz"


class Letters:
    """A tokenizer of single letters."""

    eos_token_id = 0

    def __call__(self, text: str, add_special_tokens: bool, verbose: bool) -> dict[str, list[int]]:
        assert not add_special_tokens
        return {"input_ids": [ord(letter) for letter in text]}


def ids(text: str) -> list[int]:
    return [ord(letter) if letter != "|" else 0 for letter in text]


def written(path: Path, content: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content)
    return path


@pytest.mark.parametrize(
    ("length", "tokens", "rows", "row_length"), [(4, 99, 6, 4), (4, 10, 2, 4), (100, 99, 1, 26), (26, 99, 1, 26)]
)
def test_text_is_packed_in_order(tmp_path: Path, length: int, tokens: int, rows: int, row_length: int) -> None:
    source = Source(written(tmp_path / "text.txt", ALPHABET))
    found, coverage = read_rows(source, Letters(), length, tokens)
    assert found.shape == (rows, row_length)
    assert found.flatten().tolist() == ids(ALPHABET)[: rows * row_length]
    assert str(coverage) == f"text.txt ({found.numel()} tokens of 1 document, {found.numel()} different)"


def test_documents_are_joined_by_the_end_of_text(tmp_path: Path) -> None:
    lines = ["abc", {"text": "de"}, {"text": " "}, {"text": "fgh", "id": 3}]
    file = written(tmp_path / "notes.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    found, coverage = read_rows(Source(file), Letters(), 5, 100)
    assert found.tolist() == [ids("abc|d"), ids("e|fgh")]
    assert coverage.documents == 3


def test_reading_stops_when_there_are_enough_tokens(tmp_path: Path) -> None:
    file = written(tmp_path / "notes.jsonl", '"abcd"\n"efgh"\nno json at all')
    found, coverage = read_rows(Source(file), Letters(), 4, 5)
    assert (found.tolist(), coverage.documents) == ([ids("abcd")], 2)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path: Path) -> None:
    written(tmp_path / "b.txt", "third")
    written(tmp_path / "a" / "x.md", "first")
    written(tmp_path / "a" / "y.jsonl", '{"text": "second"}')
    written(tmp_path / "a" / "z.py", "no text")
    assert list(documents(parse_source(tmp_path))) == ["first", "second", "third"]


def test_a_source_may_name_a_field_and_a_weight(tmp_path: Path) -> None:
    file = written(tmp_path / "notes.jsonl", '{"body": "abc"}')
    source = parse_source(f"{file}:body=2.5")
    assert source == Source(file, "body", 2.5)
    assert list(documents(source)) == ["abc"]
    odd = written(tmp_path / "a=3", "text of a file whose name looks like a weight")
    assert parse_source(odd) == Source(odd)


@given(counts=st.lists(st.integers(1, 30), min_size=1, max_size=5))
def test_every_stretch_of_a_mixture_has_about_its_shares(counts: list[int]) -> None:
    order = evenly(counts)
    assert [order.count(index) for index in range(len(counts))] == counts
    for end in range(len(order)):
        for index, count in enumerate(counts):
            assert abs(order[:end].count(index) - count * end / len(order)) < len(counts) + 1


def test_a_mixture_takes_tokens_by_weight(tmp_path: Path) -> None:
    one = parse_source(f"{written(tmp_path / 'one.txt', 'a' * 1000)}=3")
    two = parse_source(written(tmp_path / "two.txt", "b" * 1000))
    mixed = read_mixture([one, two], Letters(), length=10, tokens=400, batch=4)
    rows = torch.cat(list(mixed))
    assert [len(batch) for batch in mixed] == [4] * 10
    assert (rows == ord("a")).sum().item() == 300
    counted = "one.txt (300 tokens of 1 document, 1 different), two.txt (100 tokens of 1 document, 1 different)"
    assert mixed.description == counted
    assert (torch.cat(mixed[:5]) == ord("b")).sum().item() == 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "text.txt is empty; calibration needs text"),
        (b" \n\t", "text.txt is empty"),
        (b"a", "holds 1 token; calibration needs at least 2"),
        (b"ab\xff", r"text.txt is not UTF-8 text \(byte 2\)"),
    ],
)
def test_files_without_text_are_told(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        read_rows(Source(path), Letters(), 8, 100)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('"a"\n{"a": ', r"notes.jsonl, line 2: no JSON \(Expecting value\)"),
        ('{"body": "x", "id": 1}', r"notes.jsonl, line 1: no text in the field 'text'; it has body, id"),
        ("[1]", "notes.jsonl, line 1: no text in the field 'text'"),
    ],
)
def test_lines_that_are_no_documents_are_told(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(documents(Source(written(tmp_path / "notes.jsonl", content))))


def test_sources_that_are_not_there_are_told_before_anything_is_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*absent.txt: No such file"):
        parse_source(tmp_path / "absent.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"the folder .*empty holds no .txt, .md or .jsonl file"):
        parse_source(tmp_path / "empty")
    with pytest.raises(DataError, match="must be above zero, not -1"):
        parse_source(f"{tmp_path / 'absent.txt'}=-1")


def test_a_source_too_short_for_a_mixture_is_told(tmp_path: Path) -> None:
    sources = [Source(written(tmp_path / name, text)) for name, text in (("a.txt", "a" * 50), ("b.txt", "bcd"))]
    with pytest.raises(DataError, match=r"b.txt gives 3 tokens, less than one row of 8; leave it out"):
        read_mixture(sources, Letters(), length=8, tokens=100, batch=2)
