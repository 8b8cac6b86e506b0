"""onnxruntime's own operators stand for ours: every rule, grouped heads, gates by head and channel, any state."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from linearize.export.native import STANDARD, lowering_of, native_decompositions
from linearize.ops import delta_chunk, gla_chunk, gla_vec_chunk, hybrid_chunk, short_conv

B, H, G, K, V, W = 2, 4, 2, 8, 6, 5


def tensors(length, seed=0):
    """Everything that an operator takes, for `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "q": (B, length, H, K), "k": (B, length, G, K), "v": (B, length, G, V), "g": (B, length, G),
        "g_heads": (B, length, H), "g_vec": (B, length, G, K), "beta": (B, length, G), "s": (B, G, K, V),
        "s_heads": (B, H, K, V), "z": (B, G, K), "line_k": (B, W + length, G, K), "line_v": (B, W + length, G, V),
        "sink": (B, 1, G, K), "sink_v": (B, 1, G, V), "conv": (B, 3, H, K), "weight": (H, K, 4), "mix": (H,),
    }  # fmt: skip
    made = {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}
    for name in ("g", "g_heads", "g_vec"):
        made[name] = -made[name].abs()
    made |= {name: made[name].abs() for name in ("z", "mix")} | {"beta": made["beta"].sigmoid()}
    made["mask"] = torch.rand(B, W + length, generator=generator) > 0.3
    made["sink_mask"] = torch.ones(B, length, 1, dtype=torch.bool)
    made["fq"], made["fk"] = made["q"].exp(), made["line_k"][:, :length].exp()
    return made


FIXED = {"s", "s_heads", "z", "sink", "sink_v", "conv", "weight", "mix"}
HYBRID = ("q", "line_k", "line_v", "mask", "fq", "fk", "mix", "sink", "sink_v", "sink_mask", "s", "z")
CASES = {
    "linear": (("q", "k", "v", "s"), lambda q, k, v, s: gla_chunk(q, k, v, None, s, scale=0.5)),
    "gated": (("q", "k", "v", "g", "s"), lambda *x: gla_chunk(*x, scale=0.3)),
    "gated by query head": (("q", "k", "v", "g_heads", "s_heads"), lambda *x: gla_chunk(*x)),
    "gated by channel": (("q", "k", "v", "g_vec", "s"), lambda *x: gla_vec_chunk(*x, scale=2.0)),
    "no state to start from": (("q", "k", "v", "g"), lambda *x: gla_chunk(*x)),
    "delta": (("q", "k", "v", "beta", "s"), lambda q, k, v, b, s: delta_chunk(q, k, v, b, None, s, l2norm=True)),
    "gated delta": (("q", "k", "v", "beta", "g", "s"), lambda *x: delta_chunk(*x, scale=0.5, l2norm=True)),
    "convolution": (("q", "conv", "weight"), lambda *x: short_conv(*x)),
    "one denominator": (
        HYBRID,
        lambda *x: hybrid_chunk(*x[:10], None, *x[10:], window=W, scale=0.4),
    ),
    "window alone": (
        ("q", "line_k", "line_v", "mask"),
        lambda *x: hybrid_chunk(*x, window=W, scale=0.4)[:1],
    ),
}  # fmt: skip


class Everything(nn.Module):
    """All cases at once, as one export takes seconds."""

    def forward(self, inputs):
        return {name: tuple(function(*(inputs[part] for part in parts))) for name, (parts, function) in CASES.items()}


@pytest.fixture(scope="module")
def exported():
    """(the ONNX model, its session) of all cases."""
    length = torch.export.Dim("T", min=1, max=4096)
    line = ("line_k", "line_v", "mask")
    used = {part for parts, _ in CASES.values() for part in parts}
    example = {name: tensor for name, tensor in tensors(5).items() if name in used}
    dims = {name: {} if name in FIXED else {1: length + W if name in line else length} for name in example}
    program = torch.export.export(Everything(), (example,), dynamic_shapes=(dims,))
    with patch.dict(torch._decomp.decomposition_table, native_decompositions()):
        model = torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False, optimize=False).model_proto
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return model, list(example), onnxruntime.InferenceSession(model.SerializeToString(), options)


@pytest.mark.parametrize("length", [1, 5, 40])
def test_native_operators_equal_ours_at_any_length(exported, length):
    _, names, session = exported
    given = tensors(length, seed=length)
    feeds = {value.name: given[name].numpy() for value, name in zip(session.get_inputs(), names, strict=True)}
    found = iter(session.run(None, feeds))
    for name, outputs in Everything()(given).items():
        for mine in outputs:
            np.testing.assert_allclose(next(found), mine.numpy(), atol=2e-5, rtol=2e-5, err_msg=name)


def test_every_operator_but_the_window_became_one_of_onnxruntimes_own(exported):
    own = [node.op_type for node in exported[0].graph.node if node.domain == "com.microsoft"]
    assert own.count("CausalConvWithState") == 1
    assert own.count("LinearAttention") == len(CASES) - 2 + 1  # the shared denominator has a call of its own


def test_the_manifest_says_what_an_operator_became():
    assert lowering_of("delta_chunk", "native", False) == "com.microsoft.LinearAttention"
    assert lowering_of("short_conv", "native", False) == "com.microsoft.CausalConvWithState"
    assert lowering_of("hybrid_chunk", "native", False) == STANDARD
    assert lowering_of("hybrid_chunk", "native", True).startswith("com.microsoft.LinearAttention beside")
    assert lowering_of("hybrid_ring", "native", True).startswith("com.microsoft.LinearAttention beside")
    assert lowering_of("slots_chunk", "native", False) == lowering_of("delta_chunk", "portable", False) == STANDARD
