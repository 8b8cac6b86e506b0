"""What cannot be exported or read is refused in one clear line, and leaves nothing behind."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from torch import nn

import linearize
from linearize.errors import ArtifactError, DataError, ExportError
from linearize.export import onnx_graph, parity
from linearize.export.interface import Compact
from linearize.export.manifest import read_manifest
from linearize.export.runner import OnnxModel
from tests.export.models import Plain


@pytest.fixture(scope="module")
def compiled():
    torch.manual_seed(0)
    return linearize.compile(Plain(positions=64).eval(), "window{window=8}", tokens=0, progress=False)


@pytest.fixture(scope="module")
def directory(compiled, tmp_path_factory):
    return linearize.export(compiled, tmp_path_factory.mktemp("plain") / "onnx")


class Airy(Plain):
    """A model with an operator that ONNX does not have."""

    def forward(self, input_ids):
        return torch.special.airy_ai(super().forward(input_ids))


def test_an_unknown_format_lists_the_known_ones(compiled, tmp_path):
    with pytest.raises(ExportError, match="no export format 'tflite'; there are onnx, pt2, pte, torchscript"):
        linearize.export(compiled, tmp_path / "out", format="tflite")


def test_a_model_that_was_not_compiled_is_refused(tmp_path):
    with pytest.raises(ExportError, match=r"what linearize\.compile or linearize\.load returns, not a Linear"):
        linearize.export(nn.Linear(2, 2), tmp_path / "out")


def test_a_model_with_a_refused_site_is_refused_with_its_reason(compiled, tmp_path, monkeypatch):
    monkeypatch.setattr(compiled, "program", compiled.program.replace(stateless_reason="site 3 (attn.3): no key"))
    with pytest.raises(ExportError, match=r"cannot run step by step.*site 3 \(attn\.3\): no key"):
        linearize.export(compiled, tmp_path / "out")


def test_another_dtype_than_float32_is_refused(compiled, tmp_path, monkeypatch):
    weight = nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    monkeypatch.setattr(compiled.graph_module, "named_parameters", lambda: iter([("head.weight", weight)]))
    with pytest.raises(ExportError, match=r"head\.weight is torch\.bfloat16; compile the model in float32"):
        linearize.export(compiled, tmp_path / "out")


def test_an_existing_directory_is_refused_before_any_work(compiled, tmp_path, monkeypatch):
    (tmp_path / "precious").write_text("x")
    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: pytest.fail("worked before checking"))
    with pytest.raises(ArtifactError, match="exists already"):
        linearize.export(compiled, tmp_path)
    with pytest.raises(ArtifactError, match="is not a directory"):
        linearize.export(compiled, tmp_path / "precious" / "out")


def test_an_operator_without_an_onnx_form_is_named_with_its_layer(tmp_path):
    model = linearize.compile(nn.Sequential(Airy(positions=64)).eval(), "none", tokens=0, progress=False)
    with pytest.raises(ExportError, match=r"operator aten\.special_airy_ai\.default in 0 has no form in ONNX"):
        linearize.export(model, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_is_refused_before_any_work(compiled, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(torch.onnx, "export", lambda *a, **k: pytest.fail("worked before checking"))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda place: usage._replace(free=1 << 20))
    with pytest.raises(ArtifactError, match=r"has 1 MiB free, and exporting needs about 17; nothing was written"):
        linearize.export(compiled, tmp_path / "out")


def test_a_disk_that_fills_up_leaves_nothing_behind(compiled, tmp_path, monkeypatch):
    import errno

    from linearize.export import weights

    def full(tensors, path):
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(weights, "write_tensors", full)
    with pytest.raises(ArtifactError, match=r"cannot write the weights .*No space left on device"):
        linearize.export(compiled, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("form", "options", "reason"),
    [
        ("torchscript", {"portable": True}, "the format torchscript does not take portable; it takes no option"),
        ("pt2", {"quantize": "int8"}, "the format pt2 does not take quantize; it takes aoti"),
        ("onnx", {"aoti": True}, "the format onnx does not take aoti; it takes genai, portable, quantize"),
    ],
)
def test_an_option_of_another_format_is_named(compiled, tmp_path, form, options, reason):
    with pytest.raises(ExportError, match=reason):
        linearize.export(compiled, tmp_path / "out", format=form, **options)


def test_a_growing_state_is_refused_for_torchscript_by_name(tmp_path):
    kept = linearize.compile(Plain(positions=64).eval(), "none", tokens=0, progress=False)
    with pytest.raises(ExportError, match=r"layers_0_cache_k grows with the context; export to onnx or pt2"):
        linearize.export(kept, tmp_path / "out", format="torchscript")
    assert not list(tmp_path.iterdir())


def test_a_file_that_disagrees_is_not_left_behind(compiled, tmp_path, monkeypatch):
    def spoil(model, portable, is_own):
        table = max(model.graph.initializers.values(), key=lambda value: value.const_value.nbytes)
        import onnx_ir as ir

        table.const_value = ir.tensor(table.const_value.numpy() * np.float32(1.01), name=table.name)

    monkeypatch.setattr(onnx_graph, "tidy", spoil)
    with pytest.raises(
        ExportError, match=r"disagrees with PyTorch \(logits, batch 1, 1 tokens.*\): largest difference"
    ):
        linearize.export(compiled, tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def recorded(compiled, directory, tmp_path):
    """PyTorch's side of the check of `directory`, a small one."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in (("LENGTHS", (1, 3)), ("BATCHES", (2,)), ("WARM", 9), ("PROMPT", 5), ("STEPS", 4)):
            patch.setattr(parity, name, value)
        return parity.record(compiled, Compact(compiled, join=True), tmp_path)


def edit(recorded, call, change):
    """`change` the arrays of a recorded call, which are then read instead."""
    path = recorded.place / f"{call}.npz"
    with np.load(path) as file:
        arrays = dict(file)
    change(arrays)
    np.savez(path, **arrays)


def test_what_was_recorded_is_compared_with_the_file(recorded, directory):
    found = parity.check_recorded(recorded, directory)
    assert found.shapes == [[2, 1], [2, 3]]
    assert (found.prefill_tokens, found.greedy_tokens_compared, found.greedy_tokens_equal) == (5, 4, 4)
    assert found.largest_logit_difference < 1e-4


@pytest.mark.parametrize(
    ("call", "array", "reason"),
    [
        (0, "state past.layers_0_near_v", r"logits, batch 2, 1 tokens from a random state"),
        (1, "new past.layers_0_near_k", r"state past\.layers_0_near_k, batch 2, 3 tokens from a random state"),
        (-2, "logits", r"logits, batch 1, prompt of 5, after 3 greedy steps"),
        (-1, "new past.layers_0_near_v", r"state past\.layers_0_near_v, batch 1, prompt of 5, after 4 greedy steps"),
    ],
)
def test_any_array_that_differs_is_named(recorded, directory, call, array, reason):
    edit(recorded, call % len(recorded.calls), lambda arrays: arrays.update({array: arrays[array] + 0.1}))
    with pytest.raises(ExportError, match=reason):
        parity.check_recorded(recorded, directory)


def test_the_check_shrinks_to_the_learned_positions(directory):
    manifest = read_manifest(directory)
    assert manifest.max_positions == 64
    assert manifest.verified is not None
    assert manifest.verified.shapes == [[1, 1], [1, 7], [4, 1], [4, 7]]
    assert manifest.verified.prefill_tokens + manifest.verified.greedy_tokens_compared == 64
    with pytest.raises(DataError, match="65 tokens pass the source's 64 learned positions"):
        OnnxModel(directory).step(np.zeros((1, 65), dtype=np.int64))


@pytest.mark.parametrize(("expected", "found"), [([1.0], [1.001]), ([1.0], [np.nan]), ([np.nan], [1.0])])
def test_a_difference_above_the_tolerance_is_an_error(expected, found):
    with pytest.raises(ExportError, match="largest difference"):
        parity.check_close(np.array(expected), np.array(found), "logits")


def test_differences_are_relative_to_large_entries_only():
    assert parity.check_close(np.array([1000.0]), np.array([1000.01]), "logits") == pytest.approx(1e-5, rel=1e-3)
    with pytest.raises(ExportError, match=r"float64\[2\] instead of float64\[1\]"):
        parity.check_close(np.zeros(1), np.zeros(2), "logits")


@pytest.mark.parametrize("read", [read_manifest, OnnxModel])
def test_a_directory_that_is_no_export_is_named(read, tmp_path):
    with pytest.raises(ArtifactError, match=r"cannot read .*linearize\.json"):
        read(tmp_path)
    (tmp_path / "linearize.json").write_text("{")
    with pytest.raises(ArtifactError, match="not JSON"):
        read(tmp_path)
    (tmp_path / "linearize.json").write_text('{"kind": "linearized-model", "format": 1}')
    with pytest.raises(ArtifactError, match="linearize export"):
        read(tmp_path)
    (tmp_path / "linearize.json").write_text('{"kind": "linearized-pt2", "format": 1}')
    with pytest.raises(ArtifactError, match="export"):
        read(tmp_path)
    (tmp_path / "linearize.json").write_text('{"kind": "linearized-onnx", "format": 99}')
    with pytest.raises(ArtifactError, match="has format 99"):
        read(tmp_path)


def test_a_manifest_edited_by_hand_names_the_field(directory, tmp_path):
    data = json.loads((directory / "linearize.json").read_text())
    data["states"][0]["dtype"] = 7
    (tmp_path / "linearize.json").write_text(json.dumps(data))
    with pytest.raises(ArtifactError, match=r"states\.0\.dtype"):
        read_manifest(tmp_path)


def test_weights_whose_hash_differs_are_refused(directory, tmp_path):
    for name in ("linearize.json", "model.onnx", "model.safetensors"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    content = bytearray((tmp_path / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ArtifactError, match="is not what was exported"):
        OnnxModel(tmp_path).verify()


def test_a_missing_weights_file_is_named_with_the_version(directory, tmp_path):
    for name in ("linearize.json", "model.onnx"):
        (tmp_path / name).write_bytes((directory / name).read_bytes())
    with pytest.raises(ArtifactError, match=r"onnxruntime .* cannot load .*model\.onnx"):
        OnnxModel(tmp_path)


def test_unusable_tokens_are_refused(directory):
    model = OnnxModel(directory)
    for tokens in ([1, 2], [[]], [[0.5]]):
        with pytest.raises(DataError, match="must be integers"):
            model.step(tokens)
    with pytest.raises(DataError, match="vocabulary"):
        model.step([[10_000]])
    with pytest.raises(DataError, match="attention_mask has shape"):
        model.step([[1, 2]], attention_mask=[[1]])
