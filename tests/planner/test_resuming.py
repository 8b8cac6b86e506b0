"""Scoring killed in the middle: the same call goes on, measures what is missing, and ends with the same scores."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import linearize
from linearize.calibration.keys import tokens_key
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.planner import found as found_module
from linearize.planner import scores as scores_module
from linearize.planner.candidates import Candidate
from linearize.planner.found import found_candidates
from linearize.planner.scores import Scored, Scores, SiteBench, planner_scores
from linearize.program import Program
from linearize.progress import Progress
from tests import zoo

BATCHES = [zoo.tokens(1, 24, seed) for seed in range(2)]
WANTED = [
    Candidate("drop"),
    Candidate("window", (("window", 3),), (("window", 3),)),
    Candidate("slots", (("slots", 8), ("window", 4)), (("slots", 8), ("window", 4))),
]


@functools.cache
def llama() -> Program:
    """One of this process alone, whose weights no other test has changed."""
    return run_pipeline(linearize.capture(zoo.BY_NAME["llama"].build()), [RaiseAttention()])


def scored() -> Scores:
    """Found and measured, into LINEARIZE_CACHE."""
    program, key = llama(), tokens_key(BATCHES)
    more = found_candidates(program, lambda: BATCHES, key, ("moa", "share"), 48, 24, Progress(False))
    candidates = {site.index: [*WANTED, *more[site.index]] for site in program.matched}
    return planner_scores(program, lambda: BATCHES, key, candidates, Progress(False))


def killed_in_scoring(at: int) -> None:
    """Die by kill -9 before the candidate of that number is measured."""
    score, count = SiteBench.score, 0

    def kill(self: SiteBench, one: Candidate) -> Scored:
        nonlocal count
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        return score(self, one)

    scores_module.SiteBench.score = kill  # type: ignore[method-assign]
    scored()


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "whole"))
    whole = scored()
    total = sum(len(rows) for rows in whole.table.values())
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "killed"))
    root = str(Path(__file__).parents[2])
    call = f"from {__name__} import killed_in_scoring; killed_in_scoring({total - 2})"
    code = f"import sys; sys.path.append({root!r}); {call}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    measured: list[str] = []
    score = SiteBench.score
    monkeypatch.setattr(SiteBench, "score", lambda self, one: measured.append(one.label) or score(self, one))
    monkeypatch.setattr(found_module, "_search", lambda *_: pytest.fail("searched again"))
    assert scored().table == whole.table
    assert len(measured) == 2
