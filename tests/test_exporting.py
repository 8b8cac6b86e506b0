"""Exporting a saved directory: what it takes is told and bounded, and the model is gone when the file is run."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import linearize
from linearize import exporting
from linearize.errors import ArtifactError, DataError
from linearize.export import parity, write
from linearize.export.write import MARGIN, Options
from tests.export.models import VOCAB, Plain


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = linearize.compile(Plain(positions=64).eval(), "window{window=8}", tokens=0, progress=False)
    return model.save_pretrained(tmp_path_factory.mktemp("saved") / "model")


def test_the_model_is_let_go_of_before_onnxruntime_runs_the_file(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models: list[weakref.ref[Any]] = []
    real_load, real_check = exporting.load, parity.check_recorded

    def load(source: Path) -> Any:
        model = real_load(source)
        models.extend(weakref.ref(one) for one in (model, model.graph_module, *model.graph_module.parameters()))
        return model

    def check(*arguments: Any) -> Any:
        assert len(models) > 2
        assert [one() for one in models] == [None] * len(models)
        return real_check(*arguments)

    monkeypatch.setattr(exporting, "load", load)
    monkeypatch.setattr(parity, "check_recorded", check)
    lines: list[str] = []
    path = linearize.export_directory(saved, tmp_path / "out", say=lines.append)
    assert (path / "linearize.json").is_file()
    assert not (path / write.EXPECTED).exists()
    assert len(lines) == 1
    assert lines[0].startswith("exporting needs about")


def test_less_memory_than_the_forecast_is_refused_before_the_model_is_read(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exporting, "load", lambda source: pytest.fail("read the model before checking"))
    needed = exporting.forecast(saved, Options()).memory
    with pytest.raises(DataError, match=r"needs about .* of memory .*, and there are 1\.0 MiB of memory"):
        linearize.export_directory(saved, tmp_path / "out", memory=1 << 20, say=lambda line: None)
    with pytest.raises(DataError, match="needs about"):
        linearize.export_directory(saved, tmp_path / "out", memory=needed // 2, say=lambda line: None)
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporting, "free_disk", lambda folder: 1 << 20)
    with pytest.raises(DataError, match=r"has 1\.0 MiB of disk free"):
        linearize.export_directory(saved, tmp_path / "out", say=lambda line: None)


def test_the_forecast_counts_weights_once_and_what_is_here_already(saved: Path) -> None:
    size = (saved / "model.safetensors").stat().st_size
    found, quantised = exporting.forecast(saved, Options()), exporting.forecast(saved, Options(quantize="int8"))
    assert 0.9 * size < found.weights <= size
    assert found.memory > found.taken + found.weights
    assert quantised.memory > found.memory
    kept = write.logits_bytes(VOCAB)
    assert (found.disk, quantised.disk) == (MARGIN + kept + found.weights, MARGIN + kept + 2 * found.weights)


def test_what_is_kept_for_the_comparison_fits_in_what_was_told(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = []
    real = parity.check_recorded

    def check(recorded: Any, folder: Path) -> Any:
        kept.extend(path.stat().st_size for path in recorded.place.iterdir())
        return real(recorded, folder)

    for name, value in (("LENGTHS", (1, 9)), ("WARM", 8), ("PROMPT", 5), ("STEPS", 4)):
        monkeypatch.setattr(parity, name, value)
    monkeypatch.setattr(parity, "check_recorded", check)
    model = linearize.load(saved)
    linearize.export(model, tmp_path / "out")
    assert 0 < sum(kept) < write.expected_bytes(model) + len(kept) * (64 << 10)  # names and small inputs in each file


def test_a_limit_is_for_onnx(saved: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="what exporting to torchscript takes is not known"):
        linearize.export_directory(saved, tmp_path / "out", "torchscript", memory=1 << 40)


def test_a_directory_that_is_no_saved_model_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"holds no linearize\.json"):
        linearize.export_directory(tmp_path, tmp_path / "out")
