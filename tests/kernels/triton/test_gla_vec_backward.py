"""The Triton backward of `gla_vec_chunk` in the honest interpreter, against autograd through standard operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from linearize.kernels.triton import gla_vec_backward
from linearize.ops.gla_vec import gla_vec_recurrence, gla_vec_streamed
from tests.kernels.triton.checking import (
    BOUND,
    SLOW,
    assert_equals_truth,
    assert_errs_at_most_twice,
    doubled,
    drawn_like,
    error,
    gradients,
    interpreted,
    terms_of_gates,
)
from tests.kernels.triton.test_gla_vec import eager_bf16, inputs
from tests.ops.test_gla_vec import calls


def by_kernel(args, upstream, scale):
    return lambda: [x for x in gla_vec_backward.gla_vec_backward(*args, *upstream, scale) if x is not None]


def truth(args, upstream, scale):
    return [x for x in gradients(gla_vec_streamed, doubled(args), upstream, scale=scale) if x is not None]


@settings(max_examples=3, **SLOW)
@given(calls().filter(lambda call: call[0][0].shape[1] <= 80))
def test_the_backward_equals_autograd(call):
    args, scale = (*call[0][:3], call[0][3].clamp(min=-80), call[0][4]), call[1]["scale"]
    outputs = gla_vec_recurrence(*args, scale=scale)
    upstream = drawn_like(outputs)
    found, expected = interpreted(by_kernel(args, upstream, scale), orders=(0,)), truth(args, upstream, scale)
    by_channel = [(x[..., None], dx[..., None]) for x, dx in zip(args[:2], expected[:2], strict=True)]
    terms = terms_of_gates(*by_channel, (outputs[1], upstream[1]))
    assert error(found.pop(3), expected.pop(3), terms) < BOUND[args[0].dtype]
    assert_equals_truth(found, expected, args[0].dtype)


def test_the_order_of_the_programs_does_not_show():
    args = inputs(torch.float64, length=24)
    upstream = drawn_like(gla_vec_recurrence(*args, scale=0.2))
    found = interpreted(by_kernel(args, upstream, 0.2))
    assert_equals_truth(found, truth(args, upstream, 0.2), torch.float64)


@pytest.mark.parametrize("kind", ["gentle", "mixed"])
def test_bfloat16_errs_at_most_twice_as_much_as_pytorch_does(kind):
    args = inputs(torch.bfloat16, length=70, kind=kind)
    o, s = gla_vec_recurrence(*args, scale=0.2)
    upstream = [drawn_like([o])[0], torch.zeros_like(s)]
    found = interpreted(by_kernel(args, upstream, 0.2), orders=(0,))
    eager = gradients(lambda *given: [eager_bf16(*given, scale=0.2)], args, upstream[:1])
    assert_errs_at_most_twice(found, eager, truth(args, upstream, 0.2))


def test_what_needs_no_gradient_gets_none():
    args = inputs(torch.float64, length=20)
    o, s = gla_vec_recurrence(*args[:4], scale=0.2)
    ds = drawn_like([s])[0]
    needed, keywords = (False, True, False, True), {"scale": 0.2}
    found = interpreted(
        lambda: [
            x for x in gla_vec_backward.from_autograd(args[:4], (None, ds), needed, keywords) if x is not None
        ],
        orders=(0,),
    )
    expected = truth(args[:4], [torch.zeros_like(o), ds], 0.2)
    assert_equals_truth(found, [expected[1], expected[3]], torch.float64)
