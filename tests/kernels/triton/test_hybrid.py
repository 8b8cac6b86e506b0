"""The Triton kernels of `hybrid_chunk` in the honest interpreter, against the token loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from linearize.kernels.triton import hybrid
from linearize.ops.hybrid import hybrid_chunk_recurrence
from tests.kernels.triton.checking import assert_equals_truth, interpreted, rms
from tests.ops.test_hybrid import calls, make_call

SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


def truth(call):
    """The token loop in float64."""
    wide = {k: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for k, x in call.items()}
    return hybrid_chunk_recurrence(**wide)


@settings(max_examples=5, **SLOW)
@given(calls())
def test_the_forward_equals_the_recurrence(call):
    found = interpreted(lambda: hybrid.hybrid_chunk(**call), orders=(0,))
    assert_equals_truth(found, truth(call), call["q"].dtype)


@pytest.mark.parametrize("features", [0, 20])
def test_the_order_of_the_programs_does_not_show(features):
    call = make_call(batch=1, length=70, window=30, features=features, head_dim=20, value_dim=40)
    assert_equals_truth(interpreted(lambda: hybrid.hybrid_chunk(**call)), truth(call), torch.float64)


def test_a_window_longer_than_the_line_is_softmax_attention():
    call = make_call(length=20, window=150, features=0, sinks=0, logits=0, mix=False, padding="none")
    call["mask"][:, :150] = False
    o, _, _ = interpreted(lambda: hybrid.hybrid_chunk(**call), orders=(0,))
    q, k, v = (x[:, -20:].transpose(1, 2) for x in (call["q"], call["k"], call["v"]))
    expected = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=call["scale"], enable_gqa=True
    )
    torch.testing.assert_close(o, expected.transpose(1, 2))


def in_bf16(call):
    """The call on bfloat16 tensors; states stay in float32."""
    kept = ("s0", "z0", "mix", "sink_logits")
    return {
        name: x.to(torch.float32 if name in kept else torch.bfloat16)
        if isinstance(x, torch.Tensor) and x.is_floating_point()
        else x
        for name, x in call.items()
    }


def eager_bf16(call):
    """The formula as PyTorch computes it on bfloat16 tensors."""
    q, k, v, fq, fk = (call[name] for name in ("q", "k", "v", "fq", "fk"))
    length, window, group = q.shape[1], call["window"], q.shape[2] // k.shape[2]
    q, fq, k, v, fk = (
        x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (q, fq, k, v, fk)
    )
    i, j = torch.arange(length)[:, None], torch.arange(length + window)
    scores = (q @ k.mT * call["scale"]).masked_fill(~((j > i) & (j <= i + window)), float("-inf"))
    near = (scores - scores.amax(-1, keepdim=True)).exp()
    far = (fq @ fk.mT).tril()
    s0, z0 = (call[name].repeat_interleave(group, 1).bfloat16() for name in ("s0", "z0"))
    above = near @ v + far @ v[:, :, :length] + fq @ s0
    below = near.sum(-1) + far.sum(-1) + (fq @ z0[..., None])[..., 0]
    return (above / below[..., None]).transpose(1, 2)


def test_bfloat16_errs_at_most_twice_as_much_as_pytorch_does():
    call = in_bf16(make_call(length=100, window=40, features=16, sinks=0, logits=0, mix=False, padding="none"))
    o, s, z = interpreted(lambda: hybrid.hybrid_chunk(**call), orders=(0,))
    expected = truth(call)
    assert rms(o, expected[0]) < 2 * rms(eager_bf16(call), expected[0])
    assert rms(s, expected[1]) < 1e-2 * expected[1].square().mean().sqrt()
    assert rms(z, expected[2]) < 1e-5 * expected[2].square().mean().sqrt()
