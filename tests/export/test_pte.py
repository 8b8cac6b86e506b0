"""`.pte`: what ExecuTorch's runtime computes. The package is no dependency: where it is missing these tests are skipped
(`pip install .[executorch]` runs them), but for those of its errors."""

from __future__ import annotations

import importlib.util
import json
import sys

import pytest
import torch

import linearize
from linearize.errors import ArtifactError, ExportError
from linearize.export import pte
from linearize.export.manifest import read_manifest
from tests.export.models import VOCAB, Plain, build

needs_executorch = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="executorch is not installed: pip install .[executorch]"
)


def compiled_model(recipe: str):
    return linearize.compile(build("llama"), recipe, tokens=0, progress=False)


@pytest.fixture(scope="module")
def compiled():
    return compiled_model("gla{window=8}")


@pytest.fixture(scope="module")
def directory(compiled, tmp_path_factory):
    return linearize.export(compiled, tmp_path_factory.mktemp("pte") / "out", format="pte")


def test_without_the_package_the_error_names_its_extra(tmp_path, monkeypatch):
    model = linearize.compile(Plain(positions=64).eval(), "window{window=8}", tokens=0, progress=False)
    for name in [name for name in sys.modules if name.partition(".")[0] == "executorch"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "executorch", None)
    with pytest.raises(ExportError, match=r'needs the package executorch: pip install "linearize\[executorch\]"'):
        linearize.export(model, tmp_path / "out", format="pte")
    assert not list(tmp_path.iterdir())


def test_a_growing_state_is_refused_by_name(tmp_path):
    kept = linearize.compile(Plain(positions=64).eval(), "none", tokens=0, progress=False)
    with pytest.raises(ExportError, match=r"layers_0_cache_k grows with the context; export to onnx or pt2"):
        linearize.export(kept, tmp_path / "out", format="pte")


@needs_executorch
@pytest.mark.slow
def test_it_goes_on_from_a_piece_as_pytorch_does(compiled, directory):
    """A loop that knows the manifest only."""
    manifest = json.loads((directory / "linearize.json").read_text())
    assert manifest["verified"]["greedy_tokens_equal"] == manifest["verified"]["greedy_tokens_compared"] == 20
    assert manifest["verified"]["largest_difference"] < 1e-4
    from executorch.runtime import Runtime

    program = Runtime.get().load_program(directory / manifest["program"])
    piece = manifest["prefill_piece"]
    assert program.load_method("prefill_piece").execute([]) == [piece]
    states = [torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"])) for entry in manifest["states"]]
    ids = torch.randint(VOCAB, (1, 2 * piece + 2), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        expected = compiled(ids).logits
    start, found = 0, []
    for length in (piece, piece, 1, 1):
        part = ids[:, start : start + length].contiguous()
        inputs = [part, torch.ones_like(part)]
        if "position_ids" in manifest["inputs"]:
            inputs.append(torch.arange(start, start + length)[None])
        logits, *states = program.load_method("piece" if length == piece else "step").execute([*inputs, *states])
        found.append(logits)
        start += length
    torch.testing.assert_close(torch.cat(found, dim=1), expected, atol=1e-4, rtol=0)


@needs_executorch
@pytest.mark.slow
def test_both_methods_read_the_same_weights_and_products_go_to_xnnpack(compiled, directory):
    weights = sum(tensor.nbytes for tensor in compiled.graph_module.state_dict().values())
    matrices = sum(tensor.nbytes for tensor in compiled.graph_module.state_dict().values() if tensor.ndim == 2)
    size = (directory / "model.pte").stat().st_size
    assert size < weights + matrices + (256 << 10)  # a program of a layer is some 100 KiB
    assert min(json.loads((directory / "linearize.json").read_text())["calls_of_xnnpack"].values()) > 5


@needs_executorch
@pytest.mark.slow
def test_a_program_that_disagrees_is_refused(compiled, directory):
    methods = pte.load_methods(directory / "model.pte")
    assert pte.check(compiled, methods["step"], 1) < 1e-4
    with pytest.raises(ExportError, match="program of 1 tokens disagrees with PyTorch"):
        pte.check(compiled, lambda *inputs: [x + 1e-3 for x in methods["step"](*inputs)], 1)


def test_a_program_that_the_runtime_cannot_run_is_refused():
    class Method:
        def execute(self, inputs):
            raise RuntimeError("method->execute() failed with error 0x12")

    with pytest.raises(ExportError, match=r"cannot run the program that it made: method->execute\(\) failed"):
        pte._runner(object(), Method())(torch.zeros(1))


@needs_executorch
@pytest.mark.slow
def test_the_onnx_reader_says_what_it_is(directory):
    with pytest.raises(ArtifactError, match="describes a pte export"):
        read_manifest(directory)
