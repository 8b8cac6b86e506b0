"""Candidates that are found on data: windows by head, and whose cache a site could read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from linearize.calibration.keys import tokens_key
from linearize.calibration.teacher import TeacherStream
from linearize.mixers.moa import head_windows
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.planner import found as found_module
from linearize.planner.candidates import LOCAL, Candidate
from linearize.planner.found import MEANS, NEAR, RULES, chosen_rules, found_candidates, sources
from linearize.program import Program
from linearize.progress import Progress
from tests import zoo

BATCHES = [zoo.tokens(1, 48, seed) for seed in range(2)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))


def teacher(name: str = "llama") -> Program:
    return run_pipeline(zoo.captured(name), [RaiseAttention()])


def found(program: Program, *kinds: str) -> dict[int, list[Candidate]]:
    return found_candidates(program, lambda: BATCHES, tokens_key(BATCHES), kinds, 4096, 48, Progress(False))


def test_heads_that_lose_more_get_wider_windows() -> None:
    """By hand: head 0 loses nothing beyond its first rule, head 1 loses by how little it sees."""
    spec = teacher().matched[0].attention
    keys = [head_windows(1, alpha, beta, 4096)[0] for alpha, beta in RULES]
    made = chosen_rules(spec, [[0.0] * len(RULES), [1 / size for size in keys]], 4096)
    assert len(made) == len(MEANS)
    for options, mean in zip(made, MEANS, strict=True):
        windows = head_windows(2, options["start"], options["growth"], 4096)
        assert windows[0] == min(keys)
        assert sum(windows) <= 2 * (NEAR + mean * 4096)
        assert windows[1] > windows[0]


def test_a_rule_is_scored_at_the_same_number_per_token() -> None:
    for one in found(teacher(), "moa")[0]:
        options, scored = dict(one.options), dict(one.scored)
        assert (options.pop("context"), scored.pop("context")) == (4096, 48)
        assert options == scored
        assert max(options["start"]) <= LOCAL


def test_the_cache_of_a_layer_that_is_alike_is_the_closest() -> None:
    """Three layers, the last with the weights of the first but for noise: sources by error, and the least alike."""
    program = teacher("llama")
    stream = TeacherStream(program, BATCHES)
    with torch.no_grad():
        assert [sources(stream, site) for site in stream.walk(program.matched)] == [[], [0]]


def test_what_was_found_is_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    program = teacher()
    first = found(program, "moa", "share")
    assert {one.mixer for one in first[0]} == {"moa"}
    assert [one.label for one in first[1] if one.mixer == "share"] == ["share{of=0}"]
    monkeypatch.setattr(found_module, "_search", lambda *_: pytest.fail("searched again"))
    assert found(program, "moa", "share") == first


def test_nothing_is_searched_that_is_not_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(found_module, "_search", lambda *_: pytest.fail("searched"))
    assert found(teacher()) == {}
    assert found(teacher("mistral"), "moa") == {}
