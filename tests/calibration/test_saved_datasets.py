"""Hugging Face datasets on disk as a source; the hub's are read by the same rows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from linearize.calibration.sources import documents, parse_source, read_mixture
from linearize.errors import DataError
from tests.calibration.local_hub import hub
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


def read_from(address: str, home: Path, *names: str) -> subprocess.CompletedProcess[str]:
    """The documents of datasets, read by the library's own client in a process of its own, a line of JSON each."""
    code = (
        "import json, sys; from linearize.calibration.sources import documents, parse_source\n"
        "for name in sys.argv[1:]: print(json.dumps(list(documents(parse_source(name)))))"
    )
    beside = {"HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
    return subprocess.run(
        [sys.executable, "-P", "-c", code, *names], env={**os.environ, **beside}, capture_output=True, text=True,
        check=False, timeout=120,
    )  # fmt: skip


def test_a_dataset_is_read_from_a_hub(tmp_path: Path) -> None:
    lines = b"".join(json.dumps({"text": f"train {i}", "body": "x"}).encode() + b"\n" for i in range(3))
    files = {"README.md": b"", "data/train.jsonl": lines, "data/validation.jsonl": b'{"text": "held", "body": "y"}\n'}
    asked: list[str] = []
    with hub("someone/texts", files, asked) as address:
        done = read_from(address, tmp_path, "hf:someone/texts", "hf:someone/texts@validation:body")
        missing = read_from(address, tmp_path, "hf:someone/nothing")
    assert done.returncode == 0, done.stderr[-2000:]
    assert [json.loads(line) for line in done.stdout.splitlines()] == [["train 0", "train 1", "train 2"], ["y"]]
    assert any(path.endswith("data/validation.jsonl") for path in asked)
    assert "DataError: cannot read the dataset someone/nothing from the hub: " in missing.stderr


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
