"""What mixes tokens and is no matched attention keeps working, step by step, with state of its own."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import linearize
from linearize.errors import RewriteError, VerificationError
from linearize.export.runner import OnnxModel
from linearize.passes.rewrite import CarryHistory, InsertMixers, RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.program import Program
from linearize.recipe import Recipe
from linearize.rewriting.continuation import read_continuation
from linearize.runtime.model import LinearizedModel
from linearize.verify import check_state_threading
from tests import plain_models, zoo


def rewritten(name: str) -> Program:
    """A zoo model with its mixers (keep) in place and nothing else carried."""
    program = zoo.captured(name)
    plan = Recipe.load("none").plan(program.matched)
    return run_pipeline(program, [RaiseAttention(), InsertMixers(plan)])


def stepped(compiled: LinearizedModel, ids: torch.Tensor) -> torch.Tensor:
    found, state = [], None
    with torch.no_grad():
        for part in ids.split((5, 1, 1, ids.shape[1] - 7), 1):
            logits, state = compiled.step(part, state)
            found.append(logits)
    return torch.cat(found, 1)


@pytest.mark.parametrize("name", ["conv_and_attention", "average_and_attention", "hidden_bias", "cumsum_positions"])
def test_without_carrying_the_check_names_the_node_that_has_no_state(name: str) -> None:
    program = rewritten(name)
    first = read_continuation(program).wrong[0]
    with pytest.raises(VerificationError, match=rf"{first.name} = aten\.\w+.* looks at other tokens"):
        check_state_threading(program.replace(stateless_reason=""))
    check_state_threading(CarryHistory().run(program))


def test_a_model_without_anything_of_the_kind_is_left_as_it_is() -> None:
    program = rewritten("nano_gpt")
    assert CarryHistory().run(program) is program


def test_only_the_softmax_layers_of_a_hybrid_are_converted() -> None:
    compiled = zoo.compile_again("conv_beside_attention", "lolcats{window=8}", tokens=0)
    assert [row.mixer.split("{")[0] for row in compiled.report.sites] == ["lolcats", "lolcats"]
    assert sum("kept as it is, with its last inputs (96 numbers)" in note for note in compiled.report.notes) == 1
    assert compiled.state_bytes(1, context=10) == compiled.state_bytes(1, context=1000)
    ids = zoo.tokens(2, 21)
    with torch.no_grad():
        whole = compiled(ids).logits
    assert zoo.difference(stepped(compiled, ids), whole) <= 1e-4


def test_fitting_and_keeping_the_worst_leave_the_other_layers_alone() -> None:
    compiled = zoo.compile_again("conv_beside_attention", "hybrid{window=4}", tokens=2048)
    assert Counter(row.mixer.split("{")[0] for row in compiled.report.sites) == {"lolcats": 1, "keep": 1}
    ids = zoo.tokens(2, 21)
    with torch.no_grad():
        whole = compiled(ids).logits
    assert zoo.difference(stepped(compiled, ids), whole) <= 1e-4


def test_a_growing_history_costs_what_the_report_says() -> None:
    compiled = zoo.compiled("average_and_attention")
    assert any("the history of its inputs (32 numbers a token, growing)" in note for note in compiled.report.notes)
    ids = zoo.tokens(2, 9)
    _, state = compiled.step(ids)
    assert state["carried_0"].shape == (2, 9, 32)


def test_rows_of_the_batch_stay_apart_and_follow_their_state() -> None:
    compiled, ids = zoo.compiled("conv_and_attention"), zoo.tokens(3, 12)
    order = torch.tensor([2, 0, 1])
    with torch.no_grad():
        _, state = compiled.step(ids[:, :7])
        moved, _ = compiled.step(ids[order, 7:], state.select(order))
        straight, _ = compiled.step(ids[:, 7:], state)
    assert zoo.difference(moved, straight[order]) <= 1e-5


@pytest.mark.parametrize("name", ["conv_and_attention", "average_and_attention", "cumulative_and_attention"])
def test_saved_and_loaded_it_steps_alike(name: str, tmp_path: Path) -> None:
    compiled, ids = zoo.compiled(name), zoo.tokens(2, 14)
    again = linearize.load(compiled.save_pretrained(tmp_path / "saved"))
    assert torch.equal(stepped(again, ids), stepped(compiled, ids))
    assert again.report.notes == compiled.report.notes


@pytest.mark.parametrize("name", ["conv_and_attention", "average_and_attention", "cumulative_and_attention"])
def test_exported_it_steps_alike(name: str, tmp_path: Path) -> None:
    compiled, ids = zoo.compiled(name), zoo.tokens(2, 14)
    runner = OnnxModel(linearize.export(compiled, tmp_path / "onnx"), threads=1)
    found, state = [], None
    for part in ids.split((5, 1, 8), 1):
        logits, state = runner.step(part.numpy(), state)
        found.append(torch.from_numpy(logits))
    assert zoo.difference(torch.cat(found, 1), stepped(compiled, ids)) <= 1e-4


def test_a_model_without_softmax_is_refused_by_name_of_what_it_has() -> None:
    with pytest.raises(RewriteError, match=r"no softmax was found; blocks\.0\.attn: looks at other tokens"):
        zoo.compile_again("linear_attention", "lolcats")


class Count(TorchDispatchMode):
    """Counts the operators that run."""

    calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_the_work_grows_in_proportion_to_the_layers() -> None:
    counts = []
    for layers in (2, 4, 8):
        model = plain_models.Mixed(plain_models.ShortConv)
        model.blocks = torch.nn.ModuleList([plain_models.Block(plain_models.ShortConv()) for _ in range(layers)])
        program = linearize.capture(zoo.loud(model))
        program = run_pipeline(program, [RaiseAttention(), InsertMixers(Recipe.load("none").plan(()))])
        with Count() as count:
            carried = CarryHistory().run(program)
        assert len(carried.state_names) == len(program.state_names) + layers
        counts.append(count.calls)
    first, second = counts[1] - counts[0], counts[2] - counts[1]
    assert second <= 2.1 * first
