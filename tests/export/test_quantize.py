"""Fewer bits for weights and embedding, float32 for what is sensitive; verify; the same file in onnxruntime-genai."""

from __future__ import annotations

import json
import shutil

import numpy as np
import onnx
import pytest
import torch

import linearize
from linearize.errors import ArtifactError, ExportError
from linearize.export import loss, parity
from linearize.export.manifest import read_manifest
from linearize.export.onnx import own_weights, write_quantized
from linearize.export.probe import check_directory
from linearize.export.runner import OnnxModel
from linearize.export.write import compare
from linearize.program import MIXERS


@pytest.fixture(scope="module")
def compiled():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, tie_word_embeddings=True, bos_token_id=1, eos_token_id=95,
        initializer_range=0.15,
    )  # fmt: skip
    return linearize.compile(LlamaForCausalLM(config).eval(), "gla{window=8}", tokens=0, progress=False)


@pytest.fixture(scope="module")
def directory(compiled, tmp_path_factory):
    """As genai wants it, in 8 bits: all that a directory can hold at once."""
    compiled.files["tokenizer.json"] = b"{}"
    return linearize.export(compiled, tmp_path_factory.mktemp("out") / "genai", genai=True)


@pytest.fixture(scope="module", params=["int8", "int4", "web"])
def quantized(request, compiled, directory, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "ROWS", 2)
        patch.setattr(loss, "TOKENS", 64)
        return _quantized(compiled, directory, folder, request.param)


def _quantized(compiled, directory, folder, kind):
    count = write_quantized(own_weights(compiled), directory, folder, kind)
    shutil.copy(directory / "linearize.json", folder)
    return kind, folder, loss.measure_loss(loss.own_tokens(compiled), directory, folder, kind, count)


def test_the_loss_is_small_and_so_is_the_file(quantized):
    kind, _, found = quantized
    assert found.weights == 2 * 4 + 2  # head and embedding; q, k and v are one product, gate and up another
    assert 0 < found.kl < {"int8": 1e-3, "int4": 0.2, "web": 1e-2}[kind]
    assert found.perplexity == pytest.approx(found.perplexity_float32, rel=0.01 if kind == "int8" else 0.5)
    assert found.bytes < found.bytes_float32


def test_mixers_and_norms_stay_float32(compiled, quantized):
    _, folder, _ = quantized
    model = onnx.load(folder / "model.onnx")
    floats = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    for name, parameter in compiled.source.module.named_parameters():
        if name.startswith(MIXERS) or "norm" in name:
            wanted = parameter.detach().numpy()
            assert any(
                array.size == wanted.size and np.array_equal(np.sort(array.ravel()), np.sort(wanted.ravel()))
                for array in floats
            ), name


@pytest.mark.parametrize("quantized", ["int8", "int4"], indirect=True)
def test_a_tied_table_is_stored_once_in_8_bits(quantized):
    _, folder, _ = quantized
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    gather = next(node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    places = {
        tensor.name: next(entry.value for entry in tensor.external_data if entry.key == "offset")
        for tensor in model.graph.initializer
        if tensor.external_data
    }
    shared = [name for name, offset in places.items() if offset == places[gather.input[0]]]
    assert len(shared) == 2


def test_genais_own_loop_gives_the_same_100_tokens(compiled, directory):
    import onnxruntime_genai as genai

    prompt = list(range(3, 40))
    model = genai.Model(str(directory))
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=len(prompt) + 100, min_length=len(prompt) + 100)
    generator = genai.Generator(model, options)
    generator.append_tokens(np.array([prompt], dtype=np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    expected = compiled.generate(torch.tensor([prompt]), 100)[0].numpy()
    end = np.flatnonzero(expected[len(prompt) :] == 95)
    stop = len(prompt) + (int(end[0]) if len(end) else 100)
    assert stop > len(prompt) + 20
    np.testing.assert_array_equal(np.array(generator.get_sequence(0))[:stop], expected[:stop])
    np.testing.assert_array_equal(OnnxModel(directory).generate([prompt], 100)[0], expected)


def test_genais_states_have_one_shape_and_say_what_lies_where(compiled, directory):
    manifest = read_manifest(directory)
    assert len({tuple(entry.shape) for entry in manifest.states if "recurrent" in entry.input}) == 1
    parts = [part.name for entry in manifest.states for part in entry.parts or []]
    assert sorted(parts) == sorted(spec.name for spec in compiled.state_specs)


def test_a_growing_state_is_refused_for_genai_by_name(tmp_path):
    from tests.export.models import build

    kept = linearize.compile(build("llama"), "none", tokens=0, progress=False)
    with pytest.raises(ExportError, match=r"genai cannot carry layers_0_cache_k \(3 states that grow"):
        linearize.export(kept, tmp_path / "out", genai=True)
    assert not list(tmp_path.iterdir())


def test_what_a_format_does_not_take_is_named(compiled, tmp_path):
    with pytest.raises(ExportError, match="cannot quantize to 'int3'; there are int8, int4, web"):
        linearize.export(compiled, tmp_path / "out", quantize="int3")


def test_verify_repeats_the_recorded_tokens_and_the_comparison(compiled, directory, monkeypatch):
    monkeypatch.setattr(parity, "LENGTHS", (1, 7))
    monkeypatch.setattr(parity, "STEPS", 5)
    found = check_directory(directory)
    assert found.tokens_equal == found.tokens == 24
    assert found.logit_difference < 1e-4
    assert compare(compiled, directory) < 1e-4


def spoiled(directory, tmp_path, change):
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy)
    data = json.loads((copy / "linearize.json").read_text())
    change(data, copy)
    (copy / "linearize.json").write_text(json.dumps(data))
    return copy


SPOILS = {
    "model.safetensors is not what was exported": lambda data, copy: (copy / "model.safetensors").write_bytes(b"x"),
    "model.onnx is not what was exported": lambda data, copy: (copy / "model.onnx").write_bytes(b"x"),
    "the manifest says": lambda data, copy: data["states"][0].update(shape=["batch", 2, 2]),
    "was never verified": lambda data, copy: data.update(verified=None),
    "computes something else here": lambda data, copy: data["probe"].update(logits=[9.0] * 8),
    "lacks tokenizer.json": lambda data, copy: (copy / "tokenizer.json").unlink(),
    "Extra inputs are not permitted": lambda data, copy: data.update(more=1),
}


@pytest.mark.parametrize("reason", SPOILS)
def test_verify_names_what_was_changed(directory, tmp_path, reason):
    with pytest.raises(ArtifactError, match=reason):
        check_directory(spoiled(directory, tmp_path, SPOILS[reason]))
