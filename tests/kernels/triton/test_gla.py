"""The Triton kernels of `gla_chunk` in the honest interpreter, against the token loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from linearize.kernels.triton import gla
from linearize.ops.gla import gla_chunk_recurrence
from tests.kernels.triton.checking import assert_equals_truth, doubled, interpreted, rms
from tests.ops.helpers import make_gates
from tests.ops.test_gla import calls

SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@settings(max_examples=8, **SLOW)
@given(calls())
def test_the_forward_equals_the_recurrence(call):
    args, keywords = call
    found = interpreted(lambda: gla.gla_chunk(*args, **keywords), orders=(0,))
    assert_equals_truth(found, gla_chunk_recurrence(*doubled(args), **keywords), args[0].dtype)


def inputs(dtype, length=130, kind="mixed", key_dim=24, value_dim=40):
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k, v = normal(2, length, 4, key_dim), normal(2, length, 2, key_dim), normal(2, length, 2, value_dim)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    g = make_gates(kind, (2, length, 2), generator, wide)
    return q, k, v, g, normal(2, 2, key_dim, value_dim).to(wide)


def test_the_order_of_the_programs_does_not_show():
    args = inputs(torch.float64, length=70, key_dim=33, value_dim=40)
    args = tuple(x[:1] for x in args)
    found = interpreted(lambda: gla.gla_chunk(*args, scale=0.2))
    assert_equals_truth(found, gla_chunk_recurrence(*args, scale=0.2), torch.float64)


@pytest.mark.parametrize("kind", ["gentle", "steep", "mixed", "reset"])
def test_gates_cost_float32_no_digits(kind):
    args = inputs(torch.float32, kind=kind)
    found = interpreted(lambda: gla.gla_chunk(*args, scale=0.2), orders=(0,))
    assert_equals_truth(found, gla_chunk_recurrence(*doubled(args), scale=0.2), torch.float32)


def eager_bf16(q, k, v, g, s0, scale):
    """The quadratic form as PyTorch computes it on bfloat16 tensors, gates and states in float32."""
    length, group = q.shape[1], q.shape[2] // k.shape[2]
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(group, 2).transpose(1, 2) for x in (k, v))
    g, s0 = g.repeat_interleave(group, 2).transpose(1, 2), s0.repeat_interleave(group, 1)
    earlier = torch.ones(length, length).tril().bool()
    spans = torch.where(torch.ones(length, length).tril(-1).bool(), g[..., :, None], 0.0).cumsum(-2)
    weights = (q @ k.mT) * spans.exp().masked_fill(~earlier, 0.0).bfloat16()
    o = weights @ v + (q @ s0.bfloat16()) * g.cumsum(-1).exp()[..., None].bfloat16()
    return (o * scale).transpose(1, 2)


@pytest.mark.parametrize("kind", ["gentle", "mixed"])
def test_bfloat16_errs_at_most_twice_as_much_as_pytorch_does(kind):
    args = inputs(torch.bfloat16, kind=kind)
    expected = gla_chunk_recurrence(*doubled(args), scale=0.2)
    o, s = interpreted(lambda: gla.gla_chunk(*args, scale=0.2), orders=(0,))
    assert rms(o, expected[0]) < 2 * rms(eager_bf16(*args, scale=0.2), expected[0])
    assert rms(s, expected[1]) < 0.01 * expected[1].square().mean().sqrt().item()


def test_float16_states_do_not_overflow():
    q, k, v, _, s0 = inputs(torch.float16, kind="none")
    found = interpreted(lambda: gla.gla_chunk(q, k, v, None, s0 * 1e5, scale=1e-6), orders=(0,))
    expected = gla_chunk_recurrence(*doubled((q, k, v)), None, s0.double() * 1e5, scale=1e-6)
    assert expected[1].abs().max() > torch.finfo(torch.float16).max
    for a, b in zip(found, expected, strict=True):
        assert rms(a, b) < 1e-3 * b.square().mean().sqrt().item()


def test_views_that_are_not_contiguous_are_read_in_place():
    q, k, v, g, s0 = inputs(torch.float64)
    both = torch.cat([k, torch.full_like(k, float("nan"))], dim=1)
    turned = v.transpose(2, 3).contiguous().transpose(2, 3)
    found = interpreted(lambda: gla.gla_chunk(q, both[:, : k.shape[1]], turned, g, s0), orders=(0,))
    assert_equals_truth(found, gla_chunk_recurrence(q, k, v, g, s0), torch.float64)
