"""Mixtures of experts: one operator in the graph, saved, loaded and exported in both flavours."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

import linearize
from linearize.export.runner import OnnxModel
from linearize.program import op_counts
from tests import zoo

RECIPE = "window{window=5}"


def test_experts_are_one_operator_on_the_stored_matrices() -> None:
    program = zoo.compiled("mixtral", RECIPE).program  # one of its layers is a mixture
    calls = [node for node in program.graph.nodes if str(node.target) == "linearize.grouped_mm.default"]
    assert op_counts(program.graph)["linearize.grouped_mm"] == len(calls) == 2
    assert all(call.args[1].op == "get_attr" and call.kwargs["transposed"] for call in calls)


def test_saved_and_loaded_it_is_equal_to_the_bit(tmp_path: Path) -> None:
    model, ids = zoo.compiled("mixtral", RECIPE), zoo.tokens(2, 9)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(linearize.load(tmp_path / "saved")(ids).logits, model(ids).logits)


@pytest.mark.parametrize("portable", [False, True])
def test_exported_it_gives_the_same_tokens_and_reads_the_active_experts_only(portable: bool, tmp_path: Path) -> None:
    model, ids = zoo.compiled("mixtral", RECIPE), zoo.tokens(2, 9)
    linearize.export(model, tmp_path / "onnx", portable=portable)
    runner = OnnxModel(tmp_path / "onnx")
    logits, state = model.step(ids)
    found, onnx_state = runner.step(ids.numpy())
    for _ in range(12):
        assert np.abs(found - logits.detach().numpy()).max() <= 1e-4
        tokens = logits[:, -1:].argmax(-1)
        logits, state = model.step(tokens, state)
        found, onnx_state = runner.step(tokens.numpy(), onnx_state)
    graph = onnx.load(tmp_path / "onnx" / "model.onnx", load_external_data=False)
    loops = [node for node in graph.graph.node if node.op_type == "Loop"]
    assert len(loops) == 2
    assert not graph.functions
    assert "linearize" not in {opset.domain for opset in graph.opset_import}
