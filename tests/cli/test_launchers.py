"""`linearize compile` under torchrun and accelerate: two processes fit and distil, and one directory is written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import linearize

LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
    "accelerate": [
        # without --multi-gpu it starts one process, whatever their number, where there is no GPU
        "accelerate.commands.launch", "--multi-gpu", "--num-processes", "2", "--num-machines", "1",
        "--mixed-precision", "no", "--dynamo-backend", "no", "--main-process-port", "0",
    ],
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_fit_and_distil_into_one_directory(llama_dir: Path, tmp_path: Path, launcher: str) -> None:
    pytest.importorskip(launcher) if launcher == "accelerate" else None
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 100)
    command = [
        sys.executable, "-P", "-m", *LAUNCHERS[launcher], "-m", "linearize.cli", "compile", str(llama_dir), "-o", "out",
        "--data", "text.txt", "--recipe", "lizard{window=8}", "--tokens", "2048", "--distill", "1024",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("wrote out in") == 1
    assert "whole model: KL " in done.stdout
    report = linearize.load(tmp_path / "out").report
    assert report.processes == 2
    assert report.tokens_fitted > 0
    assert report.end_to_end is not None
    assert all(row.error_fitted is not None for row in report.sites)
    assert {file.name for file in tmp_path.iterdir()} == {"out", "text.txt"}
