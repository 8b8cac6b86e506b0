"""Two gloo processes, each with half of the batches, find what one process finds on all of them."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import linearize
from linearize.calibration import parallel
from linearize.calibration.closed_form import _moments
from linearize.calibration.fit import output_error
from linearize.calibration.teacher import TeacherStream
from linearize.errors import DataError
from linearize.mixers import build_mixer
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.program import Program
from linearize.recipe import Recipe
from tests import zoo

RECIPE = "lolcats{window=4,features=8}"


@functools.cache
def captured() -> Program:
    """Its own, in float64, so that what is left is the order of sums."""
    return linearize.capture(zoo.BY_NAME["enable_gqa"].build().double())


@functools.cache
def raised() -> Program:
    return run_pipeline(captured(), [RaiseAttention()])


def batches(count: int) -> list[Tensor]:
    return [zoo.tokens(3, 20, seed=index) for index in range(count)]


def in_two_processes(function: Callable[[], Any], folder: Path) -> list[Any]:
    """What each of them returns; they are forked, so what is captured here is captured there."""

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        dist.init_process_group("gloo", init_method=f"file://{folder / 'group'}", rank=rank, world_size=2)
        torch.save(function(), folder / f"{rank}.pt")
        dist.destroy_process_group()

    context = multiprocessing.get_context("fork")
    started = [context.Process(target=run, args=(rank,)) for rank in range(2)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0, 0]
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("count", [2, 3, 7])
def test_moments_and_errors_are_those_of_one_process_on_the_union(tmp_path: Path, count: int) -> None:
    site = raised().matched[0]
    mixer = build_mixer("lolcats", site.attention, {"window": 4, "maps": True})

    @torch.no_grad()
    def found() -> tuple[list[Any], float]:
        own = parallel.share(batches(count), "fit on")
        stream = TeacherStream(raised(), own).part_of(count)
        next(stream.walk((site,)))
        sums = [tensor for part in _moments(mixer, stream, site) for one in part for tensor in
                (one.gram, one.cross, one.power)]  # fmt: skip
        return sums, output_error(mixer, stream, site)

    expected, error = found()
    for sums, other in in_two_processes(found, tmp_path):
        assert len(sums) == len(expected) > 0
        for actual, tensor in zip(sums, expected, strict=True):
            assert actual.dtype == torch.float64
            assert (actual - tensor).abs().max() <= 1e-10 * tensor.abs().max().clamp_min(1e-300)
        assert other == pytest.approx(error, rel=1e-10)


def fitted(folder: Path, passes: int) -> tuple[dict[str, Tensor], list[Any]]:
    recipe = Recipe.load(RECIPE)
    recipe = recipe.model_copy(update={"fit": recipe.fit.model_copy(update={"passes": passes, "batch": 3})})
    model = linearize.compile(
        captured(), recipe, calibration=batches(9), tokens=540, progress=False, checkpoints=folder
    )
    state = {name: tensor for name, tensor in model.source.module.state_dict().items() if "mixers" in name}
    return state, [(row.error_start, row.error_fitted) for row in model.report.sites]


def test_fitting_in_closed_form_gives_the_same_in_one_process_and_two(tmp_path: Path) -> None:
    state, errors = fitted(tmp_path / "one", passes=0)
    for other, measured in in_two_processes(lambda: fitted(tmp_path / "two", passes=0), tmp_path):
        for name, tensor in state.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6)
        for one, two in zip(errors, measured, strict=True):
            assert one == pytest.approx(two, rel=1e-6)


def test_gradient_steps_leave_both_processes_with_the_same_mixers(tmp_path: Path) -> None:
    (one, errors), (two, measured) = in_two_processes(lambda: fitted(tmp_path / "work", passes=2), tmp_path)
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())
    assert errors == measured
    assert all(fitted <= start for start, fitted in errors)
    again_in = tmp_path / "again"
    again_in.mkdir()
    again, _ = in_two_processes(lambda: fitted(tmp_path / "work", passes=2), again_in)
    assert all(torch.equal(tensor, again[0][name]) for name, tensor in one.items())


def test_gradients_are_averaged(tmp_path: Path) -> None:
    def gradient() -> Tensor:
        module = torch.nn.Linear(3, 1, bias=False)
        torch.nn.init.ones_(module.weight)
        (module(torch.ones(3)) * (1 + parallel.rank())).sum().backward()
        parallel.average_gradients(module.parameters())
        assert module.weight.grad is not None
        return module.weight.grad

    assert all(torch.equal(one, torch.full((1, 3), 1.5)) for one in in_two_processes(gradient, tmp_path))


def test_alone_nothing_is_summed() -> None:
    tensor = torch.ones(2)
    assert parallel.world() == 1
    assert parallel.summed([tensor])[0] is tensor
    assert parallel.told_by_first("a") == "a"
    assert parallel.share(batches(3), "fit on")[1] is not None


def test_more_processes_than_batches_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel, "world", lambda: 4)
    with pytest.raises(DataError, match="3 batches to fit on are fewer than the 4 processes"):
        parallel.share(batches(3), "fit on")
