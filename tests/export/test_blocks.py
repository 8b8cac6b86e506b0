"""Weights in 8 and 4 bits: the error is half a step, and onnxruntime's operators read what was packed."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from linearize.export.blocks import block_size, dequantize_rows, quantize_columns, quantize_rows


def rows_of(count, width, seed=0):
    return np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 100) | st.just(256), st.sampled_from([4, 8]), st.integers(0, 99))
def test_a_number_comes_back_within_half_a_step(count, width, bits, seed):
    rows = rows_of(count, width, seed)
    blocks = quantize_rows(rows, bits)
    step = np.repeat(blocks.scales, block_size(width, bits), axis=1)[:, :width]
    allowed = (1.0 if bits == 4 else 0.5) * step  # 4 bits: the zero point is rounded as well
    assert (np.abs(dequantize_rows(blocks, width, bits) - rows) <= allowed * 1.001).all()


def test_rows_of_zeros_stay_zeros():
    for bits in (4, 8):
        assert not dequantize_rows(quantize_rows(np.zeros((2, 40), np.float32), bits), 40, bits).any()
    q, scales = quantize_columns(np.zeros((3, 2), np.float32))
    assert (q == 128).all()
    assert (scales == 1).all()


@pytest.mark.parametrize(("bits", "width", "size"), [(4, 192, 32), (8, 64, 32), (8, 192, 64)])
def test_onnxruntime_reads_the_blocks_as_they_are_meant(bits, width, size):
    rows, x = rows_of(6, width), rows_of(3, width, seed=1)
    blocks = quantize_rows(rows, bits)
    assert block_size(width, bits) == size
    table = blocks.packed.reshape(6, -1)
    weights = {"q": blocks.packed, "rows": table, "s": blocks.scales, "ids": np.array([5, 0, 3])}
    if blocks.zeros is not None:
        weights["z"] = blocks.zeros
    zero = ["z"] if blocks.zeros is not None else []
    own = {"domain": "com.microsoft", "bits": bits, "block_size": size}
    nodes = [
        helper.make_node("MatMulNBits", ["x", "q", "s", *zero], ["y"], K=width, N=6, **own),
        helper.make_node(
            "GatherBlockQuantized", ["rows", "ids", "s", *zero], ["e"], gather_axis=0, quantize_axis=1, **own
        ),
    ]
    graph = helper.make_graph(
        nodes, "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, width])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("y", "e")],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)], ir_version=10
    )
    assert isinstance(model, onnx.ModelProto)
    y, e = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    real = dequantize_rows(blocks, width, bits)
    np.testing.assert_allclose(y, x @ real.T, atol=1e-4)
    np.testing.assert_allclose(e, real[[5, 0, 3]], atol=1e-6)
