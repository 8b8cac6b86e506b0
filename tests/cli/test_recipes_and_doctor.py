"""`linearize recipes` and `linearize doctor`: short, but what they say must be so."""

import importlib.metadata
import importlib.util
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import linearize
from linearize.kernels import registry, triton
from tests.cli.conftest import Run, assert_one_error


def test_recipes_lists_every_recipe(run: Run) -> None:
    result = run("recipes")
    assert result.exit_code == 0
    assert all(f"\n{name} " in f"\n{result.stdout}" for name in linearize.recipes())


def test_a_recipe_is_shown_in_full(run: Run) -> None:
    assert "kv_sharing: share=0.5, threshold=0.5" in run("recipes", "kvsharer{share=0.5}").stdout
    text = run("recipes", "lolcats{window=32}").stdout
    assert "window=32" in text
    assert "fitted on" in text


def test_a_recipe_of_a_file_is_shown(run: Run, tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'name = "mine"\n[[rules]]\nmixer = "window"\nlayers = "every"\nn = 2\n[[rules]]\nmixer = "keep"\n'
        'layers = "list"\nindices = [1, 5]\n[fit]\ntokens = 0\n'
    )
    text = run("recipes", tmp_path / "mine.toml").stdout
    assert all(part in text for part in ("every 2 from 0", "1, 5", "nothing to fit"))


def test_an_unknown_recipe_is_one_error(run: Run) -> None:
    assert_one_error(run("recipes", "nope"), "no recipe named 'nope'", "lolcats")


def test_doctor_lists_packages_kernels_and_the_machine(run: Run) -> None:
    result = run("doctor")
    assert result.exit_code == 0, result.output
    assert sum(line.split()[1:2] == ["triton"] for line in result.stdout.splitlines()) == 1
    for part in (importlib.metadata.version("torch"), "hybrid_chunk", "reference", "demo model", "cores"):
        assert part in result.stdout


def test_doctor_says_why_a_triton_kernel_cannot_run(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    if not torch.cuda.is_available():
        line = next(line for line in run("doctor").stdout.splitlines() if "triton.gla_chunk" in line)
        assert "torch finds no GPU" in line
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    gla = replace(triton.GLA, missing=triton.missing.__wrapped__())
    monkeypatch.setitem(registry._KERNELS, ("gla_chunk", "cuda"), (gla,))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = " ".join(run("doctor").stdout.split())
    assert "triton is not installed" in text


def test_doctor_fails_when_something_needed_is_missing(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == "onnxruntime":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.0" if name == "transformers" else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = run("doctor")
    assert result.exit_code == 1
    rows = {line.split()[1]: line for line in result.stdout.splitlines() if line.startswith("wrong")}
    assert set(rows) == {"onnxruntime", "transformers"}
    assert "not installed" in rows["onnxruntime"]
