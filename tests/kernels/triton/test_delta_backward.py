"""The Triton backward of `delta_chunk` in the honest interpreter, against autograd through standard operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from linearize.kernels.triton import delta_backward
from linearize.ops.delta import delta_recurrence, delta_streamed
from tests.kernels.triton.checking import (
    SLOW,
    assert_equals_truth,
    assert_errs_at_most_twice,
    doubled,
    drawn_like,
    gradients,
    interpreted,
    terms_of_gates,
)
from tests.kernels.triton.test_delta import eager_bf16, inputs
from tests.ops.test_delta import calls


def by_kernel(args, upstream, scale, l2norm):
    def call():
        found = delta_backward.delta_backward(*args, *upstream, scale, l2norm)
        return [x for x in found if x is not None]

    return call


def truth(args, upstream, **keywords):
    found = gradients(delta_streamed, doubled(args), upstream, **keywords)
    return [x for x in found if x is not None]


@settings(max_examples=4, **SLOW)
@given(calls().filter(lambda call: call[0][0].shape[1] <= 80))
def test_the_backward_equals_autograd(call):
    args, keywords = call
    args = (*args[:4], None if args[4] is None else args[4].clamp(min=-80), args[5])
    keywords = {name: keywords[name] for name in ("scale", "l2norm")}
    outputs = delta_recurrence(*args, **keywords)
    upstream = drawn_like(outputs)
    found, expected = interpreted(by_kernel(args, upstream, **keywords), orders=(0,)), truth(args, upstream, **keywords)
    states = (outputs[1].flatten(2), upstream[1].flatten(2))
    terms = terms_of_gates(*zip(args[:2], expected[:2], strict=True), states)
    assert_equals_truth(found, expected, args[0].dtype, terms)


def test_the_order_of_the_programs_does_not_show_and_keys_may_keep_their_length():
    q, k, *rest = inputs(torch.float64, length=40, batch=1)
    args, keywords = (q, 0.2 * k, *rest), {"scale": 0.2, "l2norm": False}
    upstream = drawn_like(delta_recurrence(*args, **keywords))
    found = interpreted(by_kernel(args, upstream, **keywords))
    assert_equals_truth(found, truth(args, upstream, **keywords), torch.float64)


@pytest.mark.parametrize("kind", ["gentle", "mixed"])
def test_bfloat16_errs_at_most_twice_as_much_as_pytorch_does(kind):
    args, keywords = inputs(torch.bfloat16, length=70, kind=kind, batch=1), {"scale": 0.2, "l2norm": True}
    o, s = delta_recurrence(*args, **keywords)
    upstream = [drawn_like([o])[0], torch.zeros_like(s)]
    found = interpreted(by_kernel(args, upstream, **keywords), orders=(0,))
    eager = gradients(lambda *given: [eager_bf16(*given, scale=0.2)], args, upstream[:1])
    assert_errs_at_most_twice(found, eager, truth(args, upstream, **keywords))


def test_what_needs_no_gradient_gets_none():
    args = inputs(torch.float64, length=20, batch=1)
    o, s = delta_recurrence(*args, scale=0.2, l2norm=True)
    ds = drawn_like([s])[0]
    found = interpreted(
        lambda: [
            x
            for x in delta_backward.from_autograd(
                args[:5], (None, ds), (True, False, True, False, True), {"scale": 0.2, "l2norm": True}
            )
            if x is not None
        ],
        orders=(0,),
    )
    expected = truth((*args[:5], torch.zeros_like(args[5])), [torch.zeros_like(o), ds], scale=0.2, l2norm=True)
    assert_equals_truth(found, [expected[0], expected[2], expected[4]], torch.float64)
