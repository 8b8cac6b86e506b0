"""Hugging Face datasets on disk as a source; the hub's are read by the same rows."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from linearize.calibration.sources import documents, parse_source, read_mixture
from linearize.errors import DataError
from tests.calibration.test_generated import Letters

datasets = pytest.importorskip("datasets")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One with two splits in `both`, one without any in `alone`."""
    folder = tmp_path_factory.mktemp("datasets")
    made = {
        name: datasets.Dataset.from_dict({"text": [f"{name} {i}" for i in range(9)], "body": ["x"] * 9, "id": range(9)})
        for name in ("train", "test")
    }
    datasets.DatasetDict(made).save_to_disk(folder / "both")
    made["test"].save_to_disk(folder / "alone")
    return folder


@pytest.mark.parametrize(
    ("name", "first"),
    [("both", "train 0"), ("both@test", "test 0"), ("both@test:body", "x"), ("both:body", "x"), ("alone", "test 0"),
     ("both=3", "train 0")],
)  # fmt: skip
def test_splits_and_fields_are_read(saved: Path, name: str, first: str) -> None:
    source = parse_source(f"{saved}/{name}")
    assert source.kind == "saved"
    assert next(documents(source)) == first
    assert source.weight == (3.0 if "=" in name else 1.0)


def test_a_saved_dataset_is_packed_into_rows(saved: Path) -> None:
    data = read_mixture([parse_source(saved / "both")], Letters(), 8, 64, 2)
    assert bytes(data[0][0].tolist()).decode() == "train 0\0"
    assert data.description == "both (64 tokens of 9 documents, 15 different)"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("both@dev", r"has no split 'dev'; it has test, train \(write .*@split\)"),
        ("alone@dev", "was saved without splits, so it has no 'dev'"),
        ("both:title", r"row 0: no text in the field 'title'; it has body, id, text"),
        ("both:id", r"row 0: no text in the field 'id'"),
    ],
)
def test_what_a_dataset_does_not_have_is_told(saved: Path, name: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(documents(parse_source(f"{saved}/{name}")))


def test_a_damaged_dataset_is_told(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{}")
    with pytest.raises(DataError, match="cannot read the dataset"):
        list(documents(parse_source(tmp_path)))


def test_a_dataset_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*args: Any, **kwargs: Any) -> list[dict[str, str]]:
        asked.append((args, kwargs))
        return [{"body": "one"}, {"body": "two"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    source = parse_source("hf:someone/texts/small@validation:body")
    assert list(documents(source)) == ["one", "two"]
    assert asked == [(("someone/texts", "small"), {"split": "validation", "streaming": True})]
    assert str(source) == "someone/texts/small"


def test_a_hub_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(DataError, match="cannot read the dataset someone/texts from the hub: no route"):
        list(documents(parse_source("hf:someone/texts")))


def test_without_the_library_the_extra_is_named(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'linearize\[data\]'"):
        list(documents(parse_source(saved / "both")))
