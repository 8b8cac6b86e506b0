"""Only what can be exported: candidates that a way of exporting refuses are left out and named, plans really export."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import linearize
from linearize.errors import ExportError, RecipeError
from linearize.export import parity
from linearize.export.genai import check_fixed
from linearize.export.ways import GENAI, ONNX, PT2, TORCHSCRIPT, WAYS
from linearize.mixers import Mixer, base, register_mixer
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.planner.candidates import Candidate
from linearize.planner.exports import check_model, check_states, refusal
from linearize.planner.make import Wishes, make_planner
from linearize.planner.planning import Budget, Planner
from linearize.planner.target import H200
from linearize.program import StateTensor
from tests import zoo

LENGTH = 32


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LINEARIZE_CACHE", str(folder))
        yield folder


def planner(cache: Path, **wishes: Any) -> Planner:
    rows = [zoo.tokens(1, LENGTH, seed) for seed in range(4)]
    return make_planner(zoo.captured("llama"), 256, H200, data=rows, tokens=2 * LENGTH, wishes=Wishes(**wishes))


def test_what_grows_is_left_out_for_genai_and_named(cache: Path) -> None:
    found = planner(cache, exports=("genai",))
    mixers = {one.mixer for row in found.candidates.values() for one in row}
    assert mixers.isdisjoint({"keep", "mla"})
    assert mixers >= {"slots", "window"}
    assert set().union(*found.left_out.values()) == {"keep", "mla", "share"}
    assert all("cannot carry" in reason for reason in found.left_out)
    free = planner(cache, exports=("onnx", "pt2"))
    assert not free.left_out
    assert any(one.mixer == "keep" for one in free.candidates[0])


def test_no_budget_makes_a_plan_that_genai_refuses(cache: Path) -> None:
    found = planner(cache, exports=("genai", "torchscript"))
    for share in (0.1, 0.3, 1.0):
        budget = Budget(share * found.source_bytes)
        plan = found.plan(found.best(budget, measurements=3), budget)
        compiled = zoo.compile_again("llama", plan=plan, tokens=0)
        check_fixed(compiled.state_specs)
        assert TORCHSCRIPT.growing(compiled.state_specs) is None


@pytest.mark.slow
@pytest.mark.parametrize("way", ["genai", "torchscript"])
def test_a_plan_for_an_export_is_written_by_it(
    cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    monkeypatch.setattr(parity, "STEPS", 10)
    found = planner(cache, exports=(way,))
    budget = Budget(0.3 * found.source_bytes)
    compiled = zoo.compile_again("llama", plan=found.plan(found.solve(budget), budget), tokens=0)
    written = linearize.export(compiled, tmp_path / "out", **WAYS[way].arguments())
    assert (written / "linearize.json").is_file()


@pytest.mark.parametrize("way", ["genai", "torchscript"])
def test_what_the_planner_leaves_out_the_writer_refuses(tmp_path: Path, way: str) -> None:
    compiled = zoo.compile_again("llama", "none", tokens=0)
    with pytest.raises(ExportError) as told:
        linearize.export(compiled, tmp_path / "out", **WAYS[way].arguments())
    reason = refusal(zoo.captured("llama").matched[0], Candidate("keep"), [WAYS[way]])
    assert reason is not None
    assert reason.replace("cache_k", "layers_0_cache_k")[:40] == str(told.value)[:40]


def test_a_pin_that_the_export_refuses_is_an_error(cache: Path) -> None:
    with pytest.raises(RecipeError, match=r"site 1 .*: the pin is refused by .* \(genai\): .*cannot carry"):
        planner(cache, exports=("genai",), pins={1: ("keep", {})})


def test_nothing_left_is_an_error_with_a_way_out(cache: Path) -> None:
    with pytest.raises(RecipeError, match=r"every candidate is refused .*; pin, use or add another mixer"):
        planner(cache, exports=("torchscript",), mixers=("mla",))


def test_an_unknown_way_is_told_before_any_work() -> None:
    with pytest.raises(ExportError, match="no way of exporting is named 'gguf'; there are onnx, portable, genai"):
        make_planner(zoo.captured("llama"), 256, H200, data=[], wishes=Wishes(exports=("gguf",)))


def test_a_plan_without_any_state_is_told_for_genai() -> None:
    with pytest.raises(RecipeError, match="the best plan has none in any"):
        check_states(True, [GENAI])
    check_states(False, [GENAI])
    check_states(True, [ONNX])


def test_a_model_that_no_export_takes_is_told_at_once() -> None:
    teacher = run_pipeline(zoo.captured("llama"), [RaiseAttention()])
    check_model(teacher, [ONNX, GENAI])
    with pytest.raises(RecipeError, match=r"no plan of .* can be exported \(onnx\): .* cannot run step by step"):
        check_model(run_pipeline(zoo.captured("prefix"), [RaiseAttention()]), [ONNX])
    carrying = run_pipeline(zoo.captured("thresholded"), [RaiseAttention()])
    check_model(carrying, [ONNX])
    with pytest.raises(RecipeError, match=r"no plan of .* can be exported \(genai\): .*cannot carry"):
        check_model(carrying, [ONNX, GENAI])
    wide = teacher.replace(module=copy.deepcopy(teacher.module).double())
    with pytest.raises(RecipeError, match=r"torch.float64; compile the model in float32"):
        check_model(wide, [PT2])


@pytest.mark.slow
def test_a_mixer_of_the_users_is_tried_in_the_format(monkeypatch: pytest.MonkeyPatch) -> None:
    """A Bessel function has no form in ONNX, and is an operator of a pt2 archive."""
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))

    @register_mixer
    class Bessel(Mixer):
        name = "bessel"

        def state(self) -> tuple[StateTensor, ...]:
            return ()

        def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
            return (torch.special.bessel_j0(query),)

    site = zoo.captured("llama").matched[0]
    told = refusal(site, Candidate("bessel"), [ONNX])
    assert told is not None
    assert "bessel_j0" in told
    assert refusal(site, Candidate("bessel"), [PT2, TORCHSCRIPT]) is None
