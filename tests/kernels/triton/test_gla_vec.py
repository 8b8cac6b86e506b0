"""The Triton kernels of `gla_vec_chunk` in the honest interpreter, against the token loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from linearize.kernels.triton import gla_vec
from linearize.ops.gla_vec import channel_step_sums, gla_vec_recurrence
from tests.kernels.triton.checking import assert_equals_truth, doubled, interpreted, rms
from tests.ops.helpers import make_gates
from tests.ops.test_gla_vec import calls


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_the_forward_equals_the_recurrence(call):
    args, keywords = call
    found = interpreted(lambda: gla_vec.gla_vec_chunk(*args, **keywords), orders=(0,))
    assert_equals_truth(found, gla_vec_recurrence(*doubled(args), **keywords), args[0].dtype)


def inputs(dtype, length=100, kind="mixed"):
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    q, k, v = normal(1, length, 2, 24), normal(1, length, 1, 24), normal(1, length, 1, 40)
    return q, k, v, make_gates(kind, (1, length, 1, 24), generator, wide), normal(1, 1, 24, 40).to(wide)


def test_the_order_of_the_programs_does_not_show():
    args = inputs(torch.float64, length=70)
    found = interpreted(lambda: gla_vec.gla_vec_chunk(*args, scale=0.2))
    assert_equals_truth(found, gla_vec_recurrence(*args, scale=0.2), torch.float64)


@pytest.mark.parametrize("kind", ["gentle", "steep", "mixed", "reset"])
def test_gates_cost_float32_no_digits(kind):
    args = inputs(torch.float32, kind=kind)
    found = interpreted(lambda: gla_vec.gla_vec_chunk(*args, scale=0.2), orders=(0,))
    assert_equals_truth(found, gla_vec_recurrence(*doubled(args), scale=0.2), torch.float32)


def eager_bf16(q, k, v, g, s0, scale):
    """The quadratic form as PyTorch computes it on bfloat16 tensors, gates and states in float32."""
    group = q.shape[2] // k.shape[2]
    q, k, v, g = (x.repeat_interleave(q.shape[2] // x.shape[2], 2).transpose(1, 2) for x in (q, k, v, g))
    decay = channel_step_sums(g).exp().bfloat16()
    weights = (q[..., None, :] @ (k.mT[:, :, None] * decay))[..., 0, :]
    read = (q * g.cumsum(-2).exp().bfloat16()) @ s0.repeat_interleave(group, 1).bfloat16()
    return ((weights @ v + read) * scale).transpose(1, 2)


@pytest.mark.parametrize("kind", ["gentle", "mixed"])
def test_bfloat16_errs_at_most_twice_as_much_as_pytorch_does(kind):
    args = inputs(torch.bfloat16, kind=kind)
    o, s = interpreted(lambda: gla_vec.gla_vec_chunk(*args, scale=0.2), orders=(0,))
    expected = gla_vec_recurrence(*doubled(args), scale=0.2)
    assert rms(o, expected[0]) < 2 * rms(eager_bf16(*args, scale=0.2), expected[0])
    assert rms(s, expected[1]) < 0.01 * expected[1].square().mean().sqrt().item()
