"""Samples of a model that stays on disk: what its own distribution draws, in pieces, however many run at once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

import linearize
from linearize import on_disk
from linearize.calibration import samples_from_disk
from linearize.calibration.samples import sample_teacher
from linearize.calibration.samples_from_disk import at_once, drawn_by
from linearize.capture.on_disk import capture_directory
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.program import Program
from linearize.progress import Progress

VOCAB, PIECE, LENGTH = 40, 8, 20


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("source") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.4, bos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def teacher(source: Path) -> Program:
    return run_pipeline(capture_directory(source), [RaiseAttention()])


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samples_from_disk, "PIECE", PIECE)
    monkeypatch.setattr(samples_from_disk, "repeat_segments", lambda rows, generator: rows)


def sampled(teacher: Program, rows: int = 10) -> Tensor:
    return torch.cat(sample_teacher(teacher, rows * LENGTH, LENGTH, 3, Progress(False)))


def test_every_token_is_what_its_random_number_draws_from_the_model(source: Path, teacher: Program) -> None:
    from transformers import AutoModelForCausalLM

    rows = sampled(teacher)
    assert rows.shape == (10, LENGTH)
    generator = torch.Generator().manual_seed(3)
    chance = torch.rand(30, PIECE - 1, generator=generator)
    pieces = rows[:, : 2 * PIECE].reshape(10, 2, PIECE)
    assert (pieces[:, :, 0] == 1).all()
    assert len(pieces.reshape(-1, PIECE).unique(dim=0)) > 10
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(source)(pieces.reshape(-1, PIECE)).logits
    own = chance.reshape(10, 3, PIECE - 1)[:, :2].reshape(-1, PIECE - 1)
    expected = torch.cat([drawn_by(logits[:, place], own[:, place : place + 1]) for place in range(PIECE - 1)], dim=1)
    assert (expected == pieces.reshape(-1, PIECE)[:, 1:]).float().mean() > 0.99  # a sum may round to the other side


def test_how_many_run_at_once_does_not_matter(teacher: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    together = sampled(teacher)
    monkeypatch.setattr(samples_from_disk, "at_once", lambda *_: 4)
    assert (sampled(teacher) == together).float().mean() > 0.99


def test_as_many_run_at_once_as_there_is_memory_for(teacher: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    program = samples_from_disk.with_cache(teacher, lower=False)
    assert program.weights is not None
    monkeypatch.setattr(samples_from_disk, "free_memory", lambda: 1 << 20)
    monkeypatch.setattr(samples_from_disk, "used_memory", lambda: 5 << 20)
    many = at_once(program, PIECE, VOCAB)
    keys_and_values = 2 * 2 * 8 * PIECE * 4  # layers, both, one head of 8
    assert (1 << 18) // (4 * keys_and_values) < many < (1 << 18) // (2 * keys_and_values)
    monkeypatch.setattr(program.weights, "limit", (5 << 20) + (1 << 19))
    assert many // 2 - 1 <= at_once(program, PIECE, VOCAB) <= many // 2 + 1
    monkeypatch.setattr(program.weights, "limit", 0)
    assert at_once(program, PIECE, VOCAB) == 1


def test_tokens_are_drawn_by_their_probability() -> None:
    logits = torch.tensor([0.1, 0.2, 0.7]).log().repeat(5, 1)
    chance = torch.tensor([[0.0], [0.05], [0.15], [0.9], [0.9999999]])
    assert drawn_by(logits, chance).flatten().tolist() == [0, 0, 1, 2, 2]


@pytest.mark.slow
def test_a_model_on_disk_is_fitted_without_data(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[int] = []
    sample = samples_from_disk.sample_from_disk
    monkeypatch.setattr(
        samples_from_disk, "sample_from_disk", lambda *given: (drawn.append(given[1]), sample(*given))[1]
    )
    said: list[str] = []
    model = on_disk.compile_directory(
        source, tmp_path / "out", "lizard{window=4}", tokens=256, distill=128, progress=False, say=said.append
    )
    assert "are read 7 times" in said[1]
    assert drawn == [256, 128 * 8 // 7]
    assert model.report.data == "the teacher's own samples, in pieces of 64 tokens"
    report = linearize.load(tmp_path / "out").report
    assert all(row.error_fitted < row.error_start for row in report.sites)
    assert report.end_to_end is not None
