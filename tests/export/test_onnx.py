"""The exported file computes what PyTorch computes: every mixer, several families, any piece, any batch."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import linearize
from linearize.export.manifest import read_manifest
from linearize.export.runner import OnnxModel
from linearize.export.weights import read_ranges
from tests.export.models import VOCAB, build

CASES = {
    "llama": "lolcats{window=8}",
    "gpt2": "none",
    "mistral": "lizard{window=8}",
    "plain": "window{window=8,sinks=2}",
    "qwen3": "slots{window=8,slots=20,rounds=1,sinks=1}",
}
PORTABLE = {"llama", "gpt2", "mistral", "plain"}  # qwen3 in the native flavour: slots are the same in both


@pytest.fixture(scope="module", params=CASES)
def exported(request, tmp_path_factory):
    """(compiled model, directory) of one family with one recipe."""
    torch.manual_seed(0)
    compiled = linearize.compile(build(request.param), CASES[request.param], tokens=0, progress=False)
    compiled.files["tokenizer.json"] = b"{}"
    folder = tmp_path_factory.mktemp(request.param) / "onnx"
    return compiled, linearize.export(compiled, folder, portable=request.param in PORTABLE)


def test_prefill_of_100_and_50_steps_agree_with_pytorch(exported):
    compiled, directory = exported
    runner = OnnxModel(directory, threads=1)
    tokens = torch.randint(VOCAB, (2, 150), generator=torch.Generator().manual_seed(1))
    logits, state = compiled.step(tokens[:, :100])
    found, onnx_state = runner.step(tokens[:, :100].numpy())
    for t in range(100, 150):
        np.testing.assert_allclose(found, logits.detach().numpy(), atol=1e-4)
        logits, state = compiled.step(tokens[:, t : t + 1], state)
        found, onnx_state = runner.step(tokens[:, t : t + 1].numpy(), onnx_state)
    assert onnx_state.tokens == 150


def test_pieces_of_any_size_equal_one_piece_in_the_file_itself(exported):
    _, directory = exported
    runner = OnnxModel(directory, threads=1)
    tokens = np.random.default_rng(0).integers(VOCAB, size=(1, 41))
    whole, _ = runner.step(tokens)
    state, parts = None, []
    for start, stop in ((0, 1), (1, 7), (7, 8), (8, 40), (40, 41)):
        logits, state = runner.step(tokens[:, start:stop], state)
        parts.append(logits)
    np.testing.assert_allclose(np.concatenate(parts, axis=1), whole, atol=1e-4)


def test_generate_gives_the_tokens_of_the_compiled_model_with_left_padding(exported):
    compiled, directory = exported
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(tokens)
    mask[0, :5] = 0
    expected = compiled.generate(tokens, 20, attention_mask=mask)
    found = OnnxModel(directory, threads=1).generate(tokens.numpy(), 20, attention_mask=mask.numpy())
    np.testing.assert_array_equal(found, expected.numpy())


@pytest.mark.parametrize("exported", sorted(PORTABLE), indirect=True)
def test_only_standard_operators_of_opset_23_and_named_dims(exported):
    _, directory = exported
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 23)]
    assert {node.domain for node in model.graph.node} == {""}
    ids = model.graph.input[0]
    assert [dim.dim_param for dim in ids.type.tensor_type.shape.dim] == ["batch", "length"]
    assert len(model.graph.output) == len({output.name for output in model.graph.output})


def stored(compiled):
    """The names of the model's states, sinks and ring as one."""
    names = [spec.name for spec in compiled.state_specs]
    near = {name.replace("_sink_", "_ring_"): name.replace("_sink_", "_near_") for name in names if "_sink_" in name}
    return [near.get(name, name) for name in names if "_sink_" not in name]


def test_the_manifest_matches_the_graph_and_says_what_was_verified(exported):
    compiled, directory = exported
    manifest = read_manifest(directory)
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    names = [entry.name for entry in manifest.inputs] + [entry.input for entry in manifest.states]
    assert names == [value.name for value in model.graph.input]
    assert ["logits", *(entry.output for entry in manifest.states)] == [value.name for value in model.graph.output]
    assert [entry.input for entry in manifest.states] == [f"past.{name}" for name in stored(compiled)]
    for entry, value in zip(manifest.states, list(model.graph.input)[len(manifest.inputs) :], strict=True):
        assert entry.shape == [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
    assert manifest.verified is not None
    assert manifest.verified.largest_logit_difference < 1e-4
    assert manifest.verified.shapes == [[b, t] for b in (1, 4) for t in (1, 7, 128, 150)]
    assert manifest.verified.greedy_tokens_compared == 50
    assert (directory / "tokenizer.json").read_bytes() == b"{}"
    assert manifest.tokenizer_files == sorted(compiled.files)
    assert "tokenizer.json" in manifest.tokenizer_files


def test_every_weight_is_stored_once_in_a_safetensors_file(exported):
    from safetensors.numpy import load_file

    _, directory = exported
    OnnxModel(directory).verify()
    tensors = load_file(directory / "model.safetensors")
    model = onnx.load(directory / "model.onnx", load_external_data=False)
    external = [tensor for tensor in model.graph.initializer if tensor.external_data]
    assert {tensor.name for tensor in external} == set(tensors)
    contents = Counter((array.shape, array.tobytes()) for array in tensors.values())
    assert max(contents.values()) == 1
    ranges = read_ranges(directory / "model.safetensors")
    for tensor in external:
        where = {entry.key: entry.value for entry in tensor.external_data}
        assert (int(where["offset"]), int(where["length"])) == ranges[tensor.name]


@pytest.mark.parametrize("exported", ["llama"], indirect=True)
def test_a_tied_head_reads_the_embedding(exported):
    _, directory = exported
    sizes = [array_size for array_size in _shapes(directory) if sorted(array_size) == sorted((VOCAB, 32))]
    assert len(sizes) == 1
    manifest = read_manifest(directory)
    assert (manifest.bos_token_id, manifest.eos_token_ids) == (1, [2, 3])


@pytest.mark.parametrize("exported", ["gpt2"], indirect=True)
def test_kept_caches_grow_and_say_so(exported):
    _, directory = exported
    growing = {entry.input: entry.grows for entry in read_manifest(directory).states if entry.grows is not None}
    assert growing == {"past.layers_0_cache_k": 2, "past.layers_0_cache_v": 2, "past.layers_0_cache_mask": 1}
    runner = OnnxModel(directory, threads=1)
    _, state = runner.step([[1, 2, 3]])
    assert state.arrays()["past.layers_0_cache_k"].shape[2] == 3


@pytest.mark.parametrize("exported", ["llama", "mistral", "plain", "qwen3"], indirect=True)
def test_the_state_of_a_linearized_model_does_not_grow(exported):
    _, directory = exported
    runner = OnnxModel(directory, threads=1)
    _, short = runner.step([[1]])
    _, long = runner.step([[1] * 60])
    assert short.nbytes == long.nbytes == runner.empty_state(1).nbytes


def _shapes(directory: Path) -> list[tuple[int, ...]]:
    from safetensors.numpy import load_file

    return [array.shape for array in load_file(directory / "model.safetensors").values()]


def test_the_runner_needs_neither_torch_nor_this_project(exported, tmp_path):
    import subprocess
    import sys

    import linearize.export.runner as module

    compiled, directory = exported
    (tmp_path / "runner.py").write_text(Path(module.__file__).read_text())
    code = (
        "import sys, json; sys.modules['linearize'] = None; sys.modules['torch'] = None\n"
        "sys.path.insert(0, '.')\n"  # also where PYTHONSAFEPATH keeps the current directory out
        "from runner import OnnxModel\n"
        "print(json.dumps(OnnxModel(sys.argv[1], threads=1).generate([[1, 2, 3]], 5).tolist()))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(directory)], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == compiled.generate(torch.tensor([[1, 2, 3]]), 5).tolist()
