"""onnxruntime's own operators stand for ours: every rule, grouped heads, gates by head and channel, any state."""

from __future__ import annotations

from unittest.mock import patch

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

from linearize.export.native import STANDARD, lowering_of, native_decompositions, portable_decompositions
from linearize.ops import delta_chunk, gla_chunk, gla_vec_chunk, hybrid_ring, short_conv

B, H, G, K, V, W, SINKS = 2, 4, 2, 8, 6, 5, 3


def tensors(length, seed=0):
    """Everything that an operator takes, for `length` tokens."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {
        "q": (B, length, H, K), "k": (B, length, G, K), "v": (B, length, G, V), "g": (B, length, G),
        "g_heads": (B, length, H), "g_vec": (B, length, G, K), "beta": (B, length, G), "s": (B, G, K, V),
        "s_heads": (B, H, K, V),
        "ring_k": (B, W, G, K), "ring_v": (B, W, G, V), "sink_k": (B, SINKS, G, K), "sink_v": (B, SINKS, G, V),
        "conv": (B, 3, H, K), "weight": (H, K, 4), "omega": (H,), "query_map": (H, K, 3), "key_map": (G, K, 3),
        "s_far": (B, G, 6, V), "z_far": (B, G, 6), "logits": (H, 2),
    }  # fmt: skip
    made = {name: torch.randn(*size, generator=generator) for name, size in sizes.items()}
    for name in ("g", "g_heads", "g_vec"):
        made[name] = -made[name].abs()
    made |= {"beta": made["beta"].sigmoid(), "s_far": made["s_far"].abs(), "z_far": made["z_far"].abs()}
    for name in ("sink_k", "sink_v", "s_far", "z_far"):
        made[name][1] = 0  # the second row begins, with padding
    made["ring_mask"] = torch.rand(B, W, generator=generator) > 0.3
    made["ring_mask"][1] = False
    made["mask"] = torch.ones(B, length, dtype=torch.bool)
    made["mask"][1, : min(2, length - 1)] = False
    made["positions"] = made["mask"].cumsum(1) - 1 + torch.tensor([[9], [0]])
    return made


FIXED = {"s", "s_heads", "conv", "weight", "sink_k", "sink_v", "ring_k", "ring_v", "ring_mask", "omega", "query_map",
         "key_map", "s_far", "z_far", "logits"}  # fmt: skip
TOKENS, RING, SINK = ("q", "k", "v", "mask", "positions"), ("ring_k", "ring_v", "ring_mask"), ("sink_k", "sink_v")
MAPS, HELD = ("query_map", "key_map"), ("s_far", "z_far")
SPELLED = {"logits": "sink_logits", "s_far": "s0", "z_far": "z0"}


def case(*names):
    """A window with some of: sinks, maps, omega, logits, s0 and z0."""
    keywords = [SPELLED.get(name, name) for name in names]

    def run(*x):
        given = dict(zip(keywords, x[8:], strict=True))
        outputs = hybrid_ring(*x[:8], **given, window=W, scale=0.4)
        kept = 4 + 2 * ("sink_k" in names), 6 if "s_far" in names else 8
        return (*outputs[: kept[0]], *outputs[kept[1] :])

    return (*TOKENS, *RING, *names), run


CASES = {
    "linear": (("q", "k", "v", "s"), lambda q, k, v, s: gla_chunk(q, k, v, None, s, scale=0.5)),
    "gated": (("q", "k", "v", "g", "s"), lambda *x: gla_chunk(*x, scale=0.3)),
    "gated by query head": (("q", "k", "v", "g_heads", "s_heads"), lambda *x: gla_chunk(*x)),
    "gated by channel": (("q", "k", "v", "g_vec", "s"), lambda *x: gla_vec_chunk(*x, scale=2.0)),
    "no state to start from": (("q", "k", "v", "g"), lambda *x: gla_chunk(*x)),
    "delta": (("q", "k", "v", "beta", "s"), lambda q, k, v, b, s: delta_chunk(q, k, v, b, None, s, l2norm=True)),
    "gated delta": (("q", "k", "v", "beta", "g", "s"), lambda *x: delta_chunk(*x, scale=0.5, l2norm=True)),
    "convolution": (("q", "conv", "weight"), lambda *x: short_conv(*x)),
    "one denominator": case(*MAPS, "omega", *HELD),
    "one denominator and sinks": case(*SINK, *MAPS, *HELD),
    "one denominator and sink logits": case(*MAPS, "logits", *HELD),
    "window alone": case(),
    "window and sinks": case(*SINK),
    "window and sink logits": case(*SINK, "logits"),
}  # fmt: skip


class Everything(nn.Module):
    """All cases at once, as one export takes seconds."""

    def forward(self, inputs):
        return {name: tuple(function(*(inputs[part] for part in parts))) for name, (parts, function) in CASES.items()}


@pytest.fixture(scope="module", params=["native", "portable"])
def exported(request):
    """(the ONNX model, its inputs, its session, the flavour) of all cases."""
    table = native_decompositions() if request.param == "native" else portable_decompositions()
    length = torch.export.Dim("T", min=1, max=4096)
    used = {part for parts, _ in CASES.values() for part in parts}
    example = {name: tensor for name, tensor in tensors(5).items() if name in used}
    dims = {name: {} if name in FIXED else {1: length} for name in example}
    program = torch.export.export(Everything(), (example,), dynamic_shapes=(dims,))
    with patch.dict(torch._decomp.decomposition_table, table):
        model = torch.onnx.export(program, dynamo=True, opset_version=23, verbose=False, optimize=False).model_proto
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return model, list(example), onnxruntime.InferenceSession(model.SerializeToString(), options), request.param


@pytest.mark.parametrize("length", [1, 5, 40])
def test_what_operators_become_equals_them_at_any_length(exported, length):
    _, names, session, _ = exported
    given = tensors(length, seed=length)
    feeds = {value.name: given[name].numpy() for value, name in zip(session.get_inputs(), names, strict=True)}
    found = iter(session.run(None, feeds))
    for name, outputs in Everything()(given).items():
        for mine in outputs:
            np.testing.assert_allclose(next(found), mine.numpy(), atol=2e-5, rtol=2e-5, err_msg=name)
    assert next(found, None) is None


def test_native_operators_stand_for_all_but_the_windows(exported):
    own = [node.op_type for node in exported[0].graph.node if node.domain == "com.microsoft"]
    every = [node.op_type for node in exported[0].graph.node]
    assert every.count("Attention") == 5  # the six cases with a window, but for logits beside a far field
    if exported[3] == "portable":
        assert not own
        return
    assert own.count("CausalConvWithState") == 1
    assert own.count("LinearAttention") == 7 + 2


def test_the_manifest_says_what_an_operator_became():
    assert lowering_of("delta_chunk", "native", False) == "com.microsoft.LinearAttention"
    assert lowering_of("short_conv", "native", False) == "com.microsoft.CausalConvWithState"
    assert lowering_of("hybrid_ring", "native", False) == STANDARD
    assert lowering_of("hybrid_ring", "native", True).startswith("com.microsoft.LinearAttention beside")
    assert lowering_of("slots_chunk", "native", False) == lowering_of("delta_chunk", "portable", False) == STANDARD
