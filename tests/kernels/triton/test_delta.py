"""The Triton kernels of `delta_chunk` in the honest interpreter, against the token loop."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from linearize.kernels.triton import delta
from linearize.ops.delta import delta_recurrence, unit_triangular_inverse
from tests.kernels.triton.checking import assert_equals_truth, doubled, interpreted, rms
from tests.ops.helpers import make_gates
from tests.ops.test_delta import calls


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_the_forward_equals_the_recurrence(call):
    args, keywords = call
    found = interpreted(lambda: delta.delta_chunk(*args, **keywords), orders=(0,))
    assert_equals_truth(found, delta_recurrence(*doubled(args), **keywords), args[0].dtype)


def inputs(dtype, length=130, kind="mixed", batch=2):
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    q, k, v = normal(batch, length, 4, 24), normal(batch, length, 2, 24), normal(batch, length, 2, 40)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    beta = torch.rand(batch, length, 2, generator=generator, dtype=torch.float64).to(wide)
    return q, k, v, beta, make_gates(kind, (batch, length, 2), generator, wide), normal(batch, 2, 24, 40).to(wide)


def test_the_order_of_the_programs_does_not_show():
    args = inputs(torch.float64, length=70, batch=1)
    found = interpreted(lambda: delta.delta_chunk(*args, scale=0.2, l2norm=True))
    assert_equals_truth(found, delta_recurrence(*args, scale=0.2, l2norm=True), torch.float64)


def test_equal_keys_do_not_blow_up():
    q, k, v, beta, _, _ = inputs(torch.float32, length=128, kind="none", batch=1)
    k = k[:, :1].expand(k.shape).contiguous()
    args = q, k, v, torch.ones_like(beta)
    found = interpreted(lambda: delta.delta_chunk(*args, l2norm=True), orders=(0,))
    assert_equals_truth(found, delta_recurrence(*doubled(args), l2norm=True), torch.float32)


def eager_bf16(q, k, v, beta, g, s0, scale):
    """The quadratic form as PyTorch computes it on bfloat16 tensors; the inverse, gates and states in float32."""
    q, k = (x / x.float().norm(dim=-1, keepdim=True).to(x.dtype) for x in (q, k))
    q, k, v = q.transpose(1, 2), *(x.repeat_interleave(2, 2).transpose(1, 2) for x in (k, v))
    g, beta = (x.repeat_interleave(2, 2).transpose(1, 2) for x in (g, beta))
    s0, length = s0.repeat_interleave(2, 1), q.shape[2]
    spans = torch.where(torch.ones(length, length).tril(-1).bool(), g[..., :, None], 0.0).cumsum(-2).exp().tril()
    inverse = unit_triangular_inverse(beta[..., None] * spans * (k @ k.mT).float()).bfloat16()
    elapsed = g.cumsum(-1).exp()[..., None]
    u = inverse @ (beta[..., None] * (v - (k * elapsed.bfloat16()) @ s0.bfloat16())).bfloat16()
    o = ((q @ k.mT) * spans.bfloat16()) @ u + (q * elapsed.bfloat16()) @ s0.bfloat16()
    return (scale * o).transpose(1, 2)


@pytest.mark.parametrize("kind", ["gentle", "mixed"])
def test_bfloat16_errs_at_most_twice_as_much_as_pytorch_does(kind):
    args = inputs(torch.bfloat16, length=100, kind=kind)
    o, s = interpreted(lambda: delta.delta_chunk(*args, scale=0.2, l2norm=True), orders=(0,))
    expected = delta_recurrence(*doubled(args), scale=0.2, l2norm=True)
    assert rms(o, expected[0]) < 2 * rms(eager_bf16(*args, scale=0.2), expected[0])
    assert rms(s, expected[1]) < 0.02 * expected[1].square().mean().sqrt().item()
