"""A model that stays on disk, distilled end to end: the numbers of the stage in memory, one block held at a time."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import linearize
from linearize import on_disk
from linearize.calibration import end_to_end_state
from linearize.calibration.blocks import Blocks
from linearize.calibration.end_to_end import EndToEnd
from linearize.calibration.forecast import Forecast
from linearize.calibration.on_disk_distill import with_distillation
from linearize.capture.on_disk import capture_directory
from linearize.distill import Distill
from linearize.errors import RecipeError
from linearize.passes.calibrate.distill_end_to_end import projections_of
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.program import Program
from linearize.recipe import Recipe
from linearize.runtime.model import LinearizedModel
from tests.calibration.test_parallel import in_two_processes

VOCAB = 64
HOW = Distill(tokens=48 * 22, lengths=(8, 16), batch=6, rank=2, learning_rate=0.02)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, tied embeddings, with weights wide enough for attention to matter."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("source") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True, initializer_range=0.4,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="8KB")
    return path


@functools.cache
def captured(path: Path) -> Program:
    return capture_directory(path)


@pytest.fixture(autouse=True)
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_disk, "capture_directory", captured)


def data() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (4, 16), generator=generator) for _ in range(9)]


def recipe(**changes: Any) -> Recipe:
    base = Recipe.load("lizard{window=4}")
    fit = base.fit.model_copy(update={"passes": 0, "tokens": 576})
    return base.model_copy(update={"fit": fit, "distill": HOW.model_copy(update=changes)})


def compiled(source: Path, output: Path, **changes: Any) -> LinearizedModel:
    return on_disk.compile_directory(
        source, output, recipe(**changes), calibration=data(), progress=False, spill="disk", say=lambda text: None
    )


def weights(directory: Path) -> dict[str, Tensor]:
    return dict(linearize.load(directory).source.module.state_dict())


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_disk, "capture_directory", captured)
        path = tmp_path_factory.mktemp("whole") / "out"
        compiled(source, path)
    return path


def assert_same(one: Path, other: Path, most: float) -> None:
    expected, actual = weights(one), weights(other)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=most)


def test_it_writes_what_distilling_in_memory_writes(source: Path, whole: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    in_memory = linearize.compile(model, recipe(), calibration=data(), progress=False)
    in_memory.save_pretrained(tmp_path / "out")
    assert_same(tmp_path / "out", whole, 1e-5)
    ours, theirs = linearize.load(whole).report.end_to_end, in_memory.report.end_to_end
    assert ours is not None
    assert theirs is not None
    assert ours.kl_end == pytest.approx(theirs.kl_end, rel=1e-4)
    assert ours.kl_end < 0.95 * ours.kl_start
    changed = "model.layers.1.self_attn.q_proj.weight"
    assert not torch.equal(weights(whole)[changed], model.get_parameter(changed))


def test_no_more_than_a_block_and_the_head_is_held(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = captured(source).weights
    assert store is not None
    most, distilling = [0], [False]
    get, run = type(store)._read, EndToEnd.run

    def watched(self: Any, name: str) -> Tensor:
        tensor = get(self, name)
        held = sum(one.numel() * one.element_size() for one in self._held.values())
        most[0] = max(most[0], held) if distilling[0] else most[0]
        return tensor

    def marked(*args: Any) -> Any:
        distilling[0] = True
        return run(*args)

    monkeypatch.setattr(type(store), "_read", watched)
    monkeypatch.setattr(EndToEnd, "run", marked)
    compiled(source, tmp_path / "out", tokens=96)
    assert 0 < most[0] < store.bytes_of(store.stored) / 2


def test_killed_while_it_distils_the_same_call_goes_on(source: Path, whole: Path, tmp_path: Path) -> None:
    captured(source)

    def run_and_die() -> None:
        torch.set_num_threads(1)
        keep = end_to_end_state.TrainingState.keep

        def kill(self, found, *rest):  # type: ignore[no-untyped-def]
            keep(self, found, *rest)
            os.kill(os.getpid(), signal.SIGKILL)

        end_to_end_state.TrainingState.keep = kill
        compiled(source, tmp_path / "out")

    process = multiprocessing.get_context("fork").Process(target=run_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert list((tmp_path / "out.fitting").glob("*/end-to-end.safetensors"))
    compiled(source, tmp_path / "out")
    assert_same(tmp_path / "out", whole, 1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_two_processes_distil_it_together(source: Path, whole: Path, tmp_path: Path) -> None:
    captured(source)
    in_two_processes(lambda: compiled(source, tmp_path / "out").report.processes, tmp_path)
    assert_same(whole, tmp_path / "out", 1e-4)


def test_whole_projections_are_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r'set distill\.trainable to "adapters"'):
        compiled(source, tmp_path / "out", trainable="full")


def test_the_forecast_grows_by_what_is_trained_five_times(source: Path) -> None:
    teacher = run_pipeline(captured(source), [RaiseAttention()])
    plan, names = recipe().plan(teacher.matched), projections_of(teacher)
    fitting, blocks = Forecast(1, 1, 1.0, 1, 1, 1, False), Blocks(teacher)

    def memory(how: Distill) -> int:
        return with_distillation(fitting, teacher, plan, names, how, blocks).memory

    assert memory(HOW.model_copy(update={"tokens": 0})) == 1
    by_rank = memory(HOW.model_copy(update={"rank": 8})) - memory(HOW)
    rows_and_columns = 3 * 2 * (16 + 16) + 3 * 2 * (8 + 16)  # q and o, k and v, in three layers
    assert by_rank == pytest.approx(1.1 * 5 * 4 * 6 * rows_and_columns, abs=2)
    more_tokens = memory(HOW.model_copy(update={"batch": 12})) - memory(HOW)
    crossing = 3 * 6 * 8 * 16 * 4  # the residual stream at three cuts
    assert more_tokens > crossing
