"""The end-to-end stage on two gloo processes: the steps of one process, each with half of what is trained."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linearize.calibration import end_to_end_state, parallel
from linearize.calibration.end_to_end import own_rows
from linearize.calibration.end_to_end_chain import Chain
from linearize.calibration.end_to_end_pair import Pair
from linearize.calibration.sharding import clip_gradients, is_sharded, own_part, sharded, whole
from linearize.errors import RewriteError
from linearize.passes.rewrite import CarryHistory, InsertMixers, RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.program import Program
from linearize.recipe import Recipe
from tests import zoo
from tests.calibration.test_end_to_end import distilled, weights
from tests.calibration.test_parallel import in_two_processes


def trained(**changes: Any) -> tuple[dict[str, Tensor], float]:
    """Both losses and both lengths, with rows that two processes cannot share out evenly."""
    model = distilled(tokens=36 * 6, batch=3, hidden_share=0.3, **changes)
    assert model.report.end_to_end is not None
    return weights(model), model.report.end_to_end.kl_end


@pytest.mark.parametrize(
    "changes",
    [{}, {"trainable": "full", "shard": False}],
    ids=["adapters in parts", "projections whole"],
)
def test_two_processes_take_the_steps_of_one(tmp_path: Path, changes: dict[str, Any]) -> None:
    expected, divergence = trained(**changes)
    found = in_two_processes(lambda: trained(**changes), tmp_path)
    for actual, of_two in found:
        assert of_two == pytest.approx(divergence, rel=1e-5)
        for name, tensor in actual.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-5)
    (one, kl), (two, other) = found
    assert kl == other
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


def bytes_held() -> tuple[int, int]:
    """(what this process holds of Adam's moments, of trained parameters) after training."""
    found: list[tuple[int, int]] = []
    keep = end_to_end_state.TrainingState.keep

    def measured(self, progressed, parameters, optimiser):  # type: ignore[no-untyped-def]
        moments = [t for p in parameters for name, t in optimiser.state[p].items() if name != "step"]
        found.append((sum(map(own_bytes, moments)), sum(map(own_bytes, parameters))))
        keep(self, progressed, parameters, optimiser)

    end_to_end_state.TrainingState.keep = measured
    try:
        distilled(tokens=48)
    finally:
        end_to_end_state.TrainingState.keep = keep
    return found[-1]


def own_bytes(tensor: Tensor) -> int:
    return (tensor.to_local() if is_sharded(tensor) else tensor).untyped_storage().nbytes()  # type: ignore[attr-defined]


def test_each_process_holds_half_of_parameters_and_moments(tmp_path: Path) -> None:
    moments, parameters = bytes_held()  # one process: all of it
    for of_two in in_two_processes(bytes_held, tmp_path):
        assert of_two[0] <= 0.55 * moments
        assert of_two[1] <= 0.55 * parameters


def test_a_killed_job_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    for name in ("whole", "cut", "groups"):
        (tmp_path / name).mkdir()
    expected, _ = in_two_processes(lambda: weights(distilled(tmp_path / "whole", tokens=48 * 22)), tmp_path / "groups")

    def die() -> None:
        keep = end_to_end_state.TrainingState.keep

        def kill(self, found, *rest):  # type: ignore[no-untyped-def]
            keep(self, found, *rest)
            parallel.wait()
            os.kill(os.getpid(), signal.SIGKILL)

        end_to_end_state.TrainingState.keep = kill
        distilled(tmp_path / "cut", tokens=48 * 22)

    group = tmp_path / "groups" / "group"
    group.unlink(missing_ok=True)
    with pytest.raises(AssertionError, match=r"\[-9, -9\]"):
        in_two_processes(die, tmp_path / "groups")
    assert len(list((tmp_path / "cut").rglob("end-to-end.safetensors"))) == 1
    group.unlink(missing_ok=True)
    steps: list[int] = []

    def go_on() -> tuple[dict[str, Tensor], list[int]]:
        watch(steps)
        return weights(distilled(tmp_path / "cut", tokens=48 * 22)), steps

    for actual, done in in_two_processes(go_on, tmp_path / "groups"):
        assert done == [22]  # from step 20 on
        for name, tensor in actual.items():
            torch.testing.assert_close(tensor, expected[name], rtol=0, atol=1e-6)


def watch(steps: list[int]) -> None:
    keep = end_to_end_state.TrainingState.keep

    def counted(self, found, *rest):  # type: ignore[no-untyped-def]
        steps.append(found.step)
        keep(self, found, *rest)

    end_to_end_state.TrainingState.keep = counted


# ---- in pieces -------------------------------------------------------------------------------------------------------


def programs(name: str, recipe: str) -> tuple[Program, Program]:
    teacher = run_pipeline(zoo.captured(name), [RaiseAttention()])
    plan = Recipe.load(recipe).plan(teacher.matched)
    return teacher, run_pipeline(teacher, [InsertMixers(plan), CarryHistory()])


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_in_pieces_both_sides_compute_what_they_compute_whole(name: str) -> None:
    teacher, student = programs(name, "gla{window=4}")
    ids = zoo.tokens(2, 12)
    chain = Chain.of(teacher, student)
    assert len(chain.stretches) == len(teacher.matched) + 1
    for actual, expected in zip(chain.values(ids), Pair.of(teacher, student).values(ids), strict=True):
        assert len(actual) == len(expected) > 2
        for one, other in zip(sorted(actual, key=key), sorted(expected, key=key), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def key(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.dim(), *tensor.shape, tensor.double().sum().item()


def test_no_piece_has_the_weights_of_another() -> None:
    chain = Chain.of(*programs("llama", "gla{window=4}"))
    names = [set(stretch.student.module.state_dict()) for stretch in chain.stretches]
    projections = [name for found in names for name in found if "proj.weight" in name]
    assert len(projections) == len(set(projections)) == 7 * zoo.LAYERS
    assert all(sum("q_proj" in name for name in found) <= 1 for found in names)


# ---- parameters in parts ---------------------------------------------------------------------------------------------


class Mixed(nn.Module):
    """Three kinds: most of it float32, a scalar, and one of another dtype; and one that is not trained."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.arange(15.0).reshape(5, 3) / 10)
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.coarse = nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
        self.still = nn.Parameter(torch.ones(5), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.a.T + self.still).sum(-1, keepdim=True) * self.coarse.float()


def stepped(module: Mixed, parameters: list[Any], x: Tensor) -> list[Tensor]:
    """Gradients of one step at rate 1, clipped."""
    module(x).square().mean().backward()
    parallel.average_gradients([p for p in parameters if not is_sharded(p)])
    clip_gradients(parameters, 1.0)
    with torch.no_grad():
        for parameter in parameters:
            parameter.sub_(parameter.grad)
    return [whole(parameter.grad) for parameter in parameters]


def test_what_cannot_be_sharded_is_averaged_and_all_is_whole_again_behind(tmp_path: Path) -> None:
    x = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))

    def found() -> tuple[list[Tensor], list[Tensor], list[bool]]:
        module = Mixed()
        before = list(module.parameters())
        with sharded([module]) as stands:
            gradients = stepped(module, [stands.get(p, p) for p in before[:3]], x[parallel.rank() :: 2])
            assert before[0].numel() == 0
        assert all(one is other for one, other in zip(module.parameters(), before, strict=True))
        return gradients, [p.detach().clone() for p in before], [p in stands for p in before]

    module = Mixed()
    gradients = stepped(module, list(module.parameters())[:3], x)
    for actual, values, kinds in in_two_processes(found, tmp_path):
        assert kinds == [True, False, False, False]
        for one, other in zip([*actual, *values], [*gradients, *module.parameters()], strict=True):
            close = 1e-2 if one.dtype == torch.bfloat16 else 2e-3  # its rounding is in the norm
            torch.testing.assert_close(one, other.detach(), rtol=close, atol=close)


def test_a_parameter_of_two_blocks_is_told(tmp_path: Path) -> None:
    def found() -> str:
        one, two = nn.Linear(3, 3), nn.Linear(3, 3)
        two.weight = one.weight
        with pytest.raises(RewriteError) as error, sharded([one, two]):
            pass
        return str(error.value)

    assert all("is trained in two blocks" in text for text in in_two_processes(found, tmp_path))


def test_a_part_is_what_the_process_holds(tmp_path: Path) -> None:
    def found() -> tuple[Tensor, Tensor]:
        module = nn.Linear(2, 5)
        with sharded([module]) as stands:
            like = stands[next(iter(stands))]
            part = own_part(torch.arange(10.0).reshape(5, 2), like)
            return part.to_local(), whole(part)  # type: ignore[attr-defined]

    parts = in_two_processes(found, tmp_path)
    assert [len(part) for part, _ in parts] == [3, 2]
    assert torch.equal(torch.cat([part for part, _ in parts]), torch.arange(10.0).reshape(5, 2))


def test_rows_are_shared_out_and_one_without_any_counts_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.arange(5)[:, None]
    monkeypatch.setattr("linearize.calibration.end_to_end.world", lambda: 2)
    for number, (own, share) in enumerate([([0, 2, 4], 0.6), ([1, 3], 0.4)]):
        monkeypatch.setattr("linearize.calibration.end_to_end.rank", lambda number=number: number)
        ids, part = own_rows(rows)
        assert (ids.flatten().tolist(), part) == (own, share)
    ids, part = own_rows(rows[:1])
    assert (ids.flatten().tolist(), part) == ([0], 0.0)
