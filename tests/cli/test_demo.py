"""`linearize demo --quick`: the whole job with small numbers."""

import json
from pathlib import Path

import pytest

import linearize
from tests.cli.conftest import Run, assert_one_error


@pytest.mark.slow
def test_the_demo_does_the_whole_job(run: Run, tmp_path: Path) -> None:
    result = run("demo", "--quick", "-o", tmp_path / "out", "--json", tmp_path / "figures.json")
    assert result.exit_code == 0, result.output
    for part in ("scaled_dot_product_attention", "linearize_mixers.0(", "window only", "equal to the bit"):
        assert part in result.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["onnx"]["reload_equal"]
    assert figures["onnx"]["largest_difference"] < 1e-4
    assert figures["models"]["source"]["kl"] == pytest.approx(0, abs=1e-6)
    assert figures["models"]["source"]["recall"] > 0.9 > figures["models"]["window only"]["recall"]
    assert figures["speed"][0]["compiled"]["state_bytes"] < figures["speed"][0]["source"]["state_bytes"]
    assert len(figures["sites"]) == 4
    assert set(figures["models"]) == {"source", "window only", "lolcats", "auto (compiled)"}
    assert figures["tokens_fitted"] > 0
    best = figures["models"]["auto (compiled)"]
    assert 0 < best["kl"] < 0.2 * figures["models"]["window only"]["kl"]
    assert best["recall"] > 0.9
    assert linearize.load(tmp_path / "out" / "compiled").plan.recipe == "auto"
    assert (tmp_path / "out" / "onnx" / "model.onnx").is_file()


def test_an_existing_output_is_one_error_before_the_work(run: Run, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    assert_one_error(run("demo", "-o", tmp_path), "exists already")
