"""`linearize export`."""

from pathlib import Path

import pytest
import torch

import linearize
from tests.cli.conftest import Run, assert_one_error


def test_it_writes_onnx_that_agrees_with_pytorch(run: Run, compiled_dir: Path, tmp_path: Path) -> None:
    from linearize.export.runner import OnnxModel

    result = run("export", compiled_dir, "--format", "onnx", "-o", tmp_path / "onnx")
    assert result.exit_code == 0, result.output
    assert "model.onnx" in result.stdout
    ids = torch.arange(20).unsqueeze(0)
    logits, _ = OnnxModel(tmp_path / "onnx").step(ids.numpy())
    torch.testing.assert_close(torch.as_tensor(logits), linearize.load(compiled_dir)(ids).logits, atol=1e-4, rtol=0)
    generated = run("generate", tmp_path / "onnx", "hello", "-n", 12)
    assert generated.exit_code == 0, generated.stderr
    assert generated.stdout == run("generate", compiled_dir, "hello", "-n", 12).stdout
    assert_one_error(run("generate", tmp_path / "onnx", "hello", "--temperature", 1), "greedily")


def test_an_existing_output_is_one_error_before_the_model_is_read(run: Run, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    assert_one_error(run("export", "/nowhere", "-o", tmp_path), "exists already")


@pytest.mark.parametrize("directory", ["/nowhere", "/"])
def test_a_directory_that_is_not_compiled_is_one_error(run: Run, tmp_path: Path, directory: str) -> None:
    assert_one_error(run("export", directory, "-o", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_unknown_format_is_one_error(run: Run, compiled_dir: Path, tmp_path: Path) -> None:
    result = run("export", compiled_dir, "--format", "floppy", "-o", tmp_path / "out")
    assert_one_error(result, "floppy", "onnx")
    assert not (tmp_path / "out").exists()


def test_a_limit_that_is_too_small_is_one_error(run: Run, compiled_dir: Path, tmp_path: Path) -> None:
    assert_one_error(
        run("export", compiled_dir, "--memory", "8MiB", "-o", tmp_path / "out"), "needs about", "there are 8.0 MiB"
    )
    assert not (tmp_path / "out").exists()
