"""A model that stays on disk: compiled block by block to the same numbers, within bounds, and whatever cuts it off."""

from __future__ import annotations

import errno
import functools
import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize import on_disk, tensorfile
from linearize.calibration import fit as fitting
from linearize.calibration import spill, teacher
from linearize.calibration.forecast import Forecast
from linearize.capture import on_disk as capture_on_disk
from linearize.capture.on_disk import capture_directory, lent
from linearize.errors import ArtifactError, CaptureError, DataError, RecipeError, RewriteError
from linearize.program import Program
from linearize.runtime.model import LinearizedModel

RECIPE = "liger{window=4}"
VOCAB = 64


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, tied embeddings, in shards of a few tensors each."""
    from transformers import LlamaConfig, LlamaForCausalLM

    path = tmp_path_factory.mktemp("source") / "llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, tie_word_embeddings=True,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path, max_shard_size="8KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    return path


def data(count: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, VOCAB, (4, 16), generator=generator) for _ in range(count)]


@functools.cache
def captured(path: Path) -> Program:
    return capture_directory(path)


@pytest.fixture
def once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The source is captured for the first test only: that takes most of the time."""
    monkeypatch.setattr(on_disk, "capture_directory", captured)


@pytest.fixture
def quick(once: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is anything tried before the work."""
    known = Forecast(1, 1, 1.0, 1, 1, 1, False)
    monkeypatch.setattr(on_disk, "check_pieces", lambda program: None)
    monkeypatch.setattr(on_disk, "forecast", lambda *args: known)


def compiled(source: Path, output: Path, **options: Any) -> LinearizedModel:
    given = {"calibration": data(), "tokens": 384, "progress": False, "spill": "disk", "say": lambda text: None}
    return on_disk.compile_directory(source, output, RECIPE, **{**given, **options})  # type: ignore[arg-type]


def weights(directory: Path) -> dict[str, Tensor]:
    return dict(linearize.load(directory).source.module.state_dict())


def assert_same(one: Path, other: Path) -> None:
    expected, actual = weights(one), weights(other)
    assert expected.keys() == actual.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=0, atol=1e-6)
    rows = [[(row.error_start, row.error_fitted) for row in linearize.load(path).report.sites] for path in (one, other)]
    assert rows[0] == rows[1]


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What an uninterrupted run writes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(on_disk, "capture_directory", captured)
        path = tmp_path_factory.mktemp("whole") / "out"
        compiled(source, path)
    return path


# ---- the same as in memory -------------------------------------------------------------------------------------------


def test_capture_from_disk_finds_what_capture_in_memory_finds(source: Path) -> None:
    from transformers import AutoModelForCausalLM

    program = captured(source)
    in_memory = linearize.capture(AutoModelForCausalLM.from_pretrained(source))
    assert all(parameter.is_meta for parameter in program.module.parameters())
    assert [site.attention for site in program.matched] == [site.attention for site in in_memory.matched]
    assert [site.projected for site in program.matched] == [site.projected for site in in_memory.matched]
    assert program.padding_moves_positions == in_memory.padding_moves_positions
    assert program.notes == ()


@pytest.mark.usefixtures("once")
def test_it_writes_what_compile_in_memory_writes(source: Path, whole: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(source)
    linearize.compile(model, RECIPE, calibration=data(), tokens=384, progress=False).save_pretrained(tmp_path / "out")
    assert_same(tmp_path / "out", whole)
    assert {file.name for file in whole.iterdir()} == {file.name for file in (tmp_path / "out").iterdir()}
    ids = data(1)[0]
    logits = [linearize.load(path)(ids).logits for path in (whole, tmp_path / "out")]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)
    assert not whole.with_name("out.fitting").exists()


@pytest.mark.usefixtures("once")
def test_what_is_kept_in_memory_between_blocks_gives_the_same(source: Path, whole: Path, tmp_path: Path) -> None:
    said: list[str] = []
    compiled(source, tmp_path / "out", spill="memory", say=said.append)
    assert_same(tmp_path / "out", whole)
    assert len(said) == 1
    assert "of memory" in said[0]
    assert "of disk" in said[0]
    assert "kept in memory" in said[0]


@pytest.mark.usefixtures("once")
def test_a_ranking_recipe_and_kept_layers_without_fitting(source: Path, tmp_path: Path) -> None:
    model = on_disk.compile_directory(
        source, tmp_path / "out", "auto{window=4}", calibration=data(), progress=False, say=lambda text: None
    )
    assert [entry.mixer for entry in model.plan.entries] == ["slots"] * 3
    assert linearize.load(tmp_path / "out")(data(1)[0]).logits.isfinite().all()


# ---- bounds ----------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("once")
def test_no_more_than_a_block_is_held(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = captured(source).weights
    assert store is not None
    most, hold = [0], store.hold

    def watched(names: Any) -> None:
        most[0] = max(most[0], sum(tensor.numel() * tensor.element_size() for tensor in store._held.values()))
        hold(names)

    monkeypatch.setattr(store, "hold", watched)
    compiled(source, tmp_path / "out")
    everything = store.bytes_of(store.stored)
    assert 0 < most[0] < everything / 2


@pytest.mark.usefixtures("once")
def test_what_does_not_fit_is_refused_before_the_work(source: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"one block of the model needs .* of memory .*and there are 1.0 MiB"):
        compiled(source, tmp_path / "out", memory=1 << 20)
    assert not (tmp_path / "out.fitting").exists()


@pytest.mark.usefixtures("once")
def test_a_disk_that_is_too_small_is_told_before_the_work(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("linearize.calibration.forecast.free_disk", lambda folder: 10)
    with pytest.raises(DataError, match="10 B of disk free; write to another disk"):
        compiled(source, tmp_path / "out")


@pytest.mark.parametrize("recipe", ["kvsharer", "svd-llm"])
def test_what_looks_at_the_whole_model_is_left_to_compile(tmp_path: Path, source: Path, recipe: str) -> None:
    with pytest.raises(RecipeError, match="compile it without streaming"):
        on_disk.compile_directory(source, tmp_path / "out", recipe)


# ---- cut off ---------------------------------------------------------------------------------------------------------


def at_call(owner: Any, name: str, number: int, act: Callable[[], None]) -> None:
    """Do something else at the n-th call (from 0)."""
    function, calls = getattr(owner, name), [0]

    def replaced(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == number + 1:
            act()
        return function(*args, **kwargs)

    setattr(owner, name, replaced)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


POINTS = {
    "spill": (spill.Writer, "add", 9),
    "statistics": (fitting, "_prepare", 1),
    "gradient steps": (torch.optim.Adam, "step", 14),
    "conversion": (on_disk, "finish", 0),
    "writing weights": (on_disk, "read_tensor", 3),
}


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("point", POINTS)
def test_killed_anywhere_the_same_call_goes_on_and_ends_the_same(
    source: Path, whole: Path, tmp_path: Path, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    captured(source)

    def run_and_die() -> None:
        torch.set_num_threads(1)
        monkeypatch.setattr(spill, "SHARD", 1)
        at_call(*POINTS[point], die)
        compiled(source, tmp_path / "out")

    process = multiprocessing.get_context("fork").Process(target=run_and_die)
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "out.fitting").is_dir()
    compiled(source, tmp_path / "out")
    assert_same(tmp_path / "out", whole)
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("quick")
def test_what_is_done_is_not_done_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(on_disk, "finish", stopped)
        with pytest.raises(KeyboardInterrupt):
            compiled(source, tmp_path / "out")
    monkeypatch.setattr(teacher.TeacherStream, "_advance", None)
    monkeypatch.setattr(fitting, "_descend", None)
    compiled(source, tmp_path / "out")
    assert (tmp_path / "out" / "linearize.json").is_file()


def stopped(*_: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("place", ["spill", "checkpoint"])
def test_a_full_disk_is_told_and_what_was_done_is_kept(
    source: Path, whole: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        if place == "checkpoint":
            replaced = os.replace
            patch.setattr(os, "replace", lambda a, b: full() if "site-1" in str(b) else replaced(a, b))
        else:
            bytes_of = tensorfile._bytes
            calls = [0]

            def fills(planned: Any) -> Any:
                calls[0] += 1
                return full() if calls[0] > 25 else bytes_of(planned)

            patch.setattr(tensorfile, "_bytes", fills)
        with pytest.raises(ArtifactError, match="No space left on device"):
            compiled(source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "out.fitting").glob("*/site-0.safetensors"))
    assert not list((tmp_path / "out.fitting").rglob(".*"))
    compiled(source, tmp_path / "out")
    assert_same(tmp_path / "out", whole)


# ---- refused ---------------------------------------------------------------------------------------------------------


def broken(source: Path, target: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Path:
    from safetensors.torch import load_file, save_file

    target.mkdir()
    (target / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(change(tensors), target / "model.safetensors")
    return target


def test_weights_under_other_names_or_shapes_are_told(source: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.up_proj.weight"
    lost = broken(source, tmp_path / "lost", lambda all: {key: one for key, one in all.items() if key != name})
    with pytest.raises(ArtifactError, match=r"no file holds model.layers.1.mlp.up_proj.weight \(1 of"):
        capture_directory(lost)
    cut = broken(source, tmp_path / "cut", lambda all: {**all, name: all[name][:3].clone()})
    with pytest.raises(ArtifactError, match=r"up_proj.weight has shape \[24, 16\] in the model and \[3, 16\] in"):
        capture_directory(cut)


def test_a_directory_without_safetensors_is_told(source: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((source / "config.json").read_bytes())
    with pytest.raises(ArtifactError, match=r"holds neither model\.safetensors nor"):
        capture_directory(tmp_path)


def test_an_attention_that_is_not_matched_is_left_to_compile(source: Path) -> None:
    program = captured(source)
    first = program.matched[0]
    refused = linearize.spec.NoMatch(first.index, first.module, "for this test")
    with pytest.raises(RewriteError, match=r"site 0 .*was not matched \(for this test\).* without streaming"):
        on_disk.check_pieces(program.replace(sites=(refused, *program.sites[1:])))


def test_a_graph_that_is_not_the_model_is_found_by_value(source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ones(model: nn.Module, program: Program, inputs: dict[str, Tensor]) -> Tensor:
        return torch.ones(*inputs["input_ids"].shape, VOCAB)

    monkeypatch.setattr("linearize.capture.on_disk._source_logits", ones)
    with pytest.raises(CaptureError, match="differs from the model by"):
        capture_on_disk._checked(captured(source), nn.Identity())


def test_lent_weights_are_taken_back(source: Path) -> None:
    from linearize.capture import hf

    model, store = hf.skeleton(source), captured(source).weights
    assert store is not None
    with lent(model, store), torch.no_grad():
        logits = model(input_ids=data(1)[0], use_cache=False).logits
    assert logits.isfinite().all()
    assert all(parameter.is_meta for parameter in model.parameters())


# ---- the teacher's activations ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("once")
def test_a_teacher_that_is_not_finite_is_told_by_site(source: Path, tmp_path: Path) -> None:
    def spoil(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
        return tensors

    program = captured(source)
    store = program.weights
    assert store is not None
    spoiled = broken(source, tmp_path / "spoiled", spoil)
    found = {name: one for name, one in tensorfile.read_header(spoiled / "model.safetensors")[0].items()}
    other = linearize.weights.Weights({**store.stored, **found}, store.dtypes, store.values)
    raised = linearize.pipeline.run_pipeline(program, [linearize.passes.rewrite.RaiseAttention()])
    stream = teacher.TeacherStream(raised.replace(module=raised.copy_graph(), weights=other), data(2))
    walk = stream.walk(raised.matched)
    for _ in range(2):
        stream.site_values(next(walk), (), 0)
    last = next(walk)
    with pytest.raises(DataError, match=r"not finite before site 2 \(model.layers.2.self_attn\), at add_\w+ on batch"):
        stream.site_values(last, (), 0)
