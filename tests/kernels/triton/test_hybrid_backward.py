"""The Triton backward of `hybrid_chunk` in the honest interpreter, against autograd through standard operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from linearize.kernels import triton
from linearize.kernels.triton import hybrid_backward
from linearize.ops import hybrid_chunk
from linearize.ops._backward import BACKWARDS, Backward
from linearize.ops.hybrid import hybrid_chunk_streamed
from tests.kernels.triton.checking import (
    SLOW,
    assert_equals_truth,
    assert_errs_at_most_twice,
    doubled,
    drawn_like,
    gradients,
    interpreted,
    is_float,
)
from tests.kernels.triton.shim import honest
from tests.kernels.triton.test_hybrid import eager_bf16, in_bf16
from tests.ops.test_hybrid import calls, make_call

INPUTS = ("q", "k", "v", "mask", "fq", "fk", "mix", "sink_k", "sink_v", "sink_mask", "sink_logits", "s0", "z0")


def inputs_of(call):
    return [call.get(name) for name in INPUTS], {"window": call["window"], "scale": call["scale"]}


def given_of(found):
    return [x for x in found if x is not None]


def by_kernel(args, upstream, keywords):
    upstream = [x if x.numel() else None for x in upstream]
    return lambda: given_of(hybrid_backward.hybrid_backward(*args, *upstream, **keywords))


def truth(args, upstream, keywords):
    found = gradients(hybrid_chunk_streamed, doubled(args), upstream, **keywords)
    # autograd finds no way from c to the outputs where there is no far field
    return [torch.zeros_like(x) if dx is None else dx for x, dx in zip(args, found, strict=True) if is_float(x)]


@settings(max_examples=4, **SLOW)
@given(calls().filter(lambda call: call["q"].shape[1] <= 80))
def test_the_backward_equals_autograd(call):
    args, keywords = inputs_of(call)
    upstream = drawn_like(hybrid_chunk_streamed(*args, **keywords))
    found = interpreted(by_kernel(args, upstream, keywords), orders=(0,))
    assert_equals_truth(found, truth(args, upstream, keywords), args[0].dtype)


@pytest.mark.parametrize("features", [0, 20])
def test_the_order_of_the_programs_does_not_show(features):
    call = make_call(batch=1, length=40, window=30, features=features, head_dim=20, value_dim=40)
    args, keywords = inputs_of(call)
    upstream = drawn_like(hybrid_chunk_streamed(*args, **keywords))
    found = interpreted(by_kernel(args, upstream, keywords))
    assert_equals_truth(found, truth(args, upstream, keywords), torch.float64)


def test_padding_of_nan_reaches_no_gradient():
    call = make_call(batch=1, length=20, window=9, features=6, sinks=0, padding="random")
    args, keywords = inputs_of(call)
    upstream = drawn_like(hybrid_chunk_streamed(*args, **keywords))
    expected = truth(args, upstream, keywords)
    hidden = ~call["mask"]
    for n in (1, 2):
        args[n] = args[n].masked_fill(hidden[..., None, None], float("nan"))
    args[5] = args[5].masked_fill(hidden[:, :20, None, None], float("nan"))
    assert_equals_truth(interpreted(by_kernel(args, upstream, keywords), orders=(0,)), expected, torch.float64)


def test_bfloat16_errs_at_most_twice_as_much_as_pytorch_does():
    call = in_bf16(make_call(length=70, window=40, features=16, sinks=0, logits=0, mix=False, padding="none"))
    args, keywords = inputs_of(call)
    o, s, z = hybrid_chunk_streamed(*args, **keywords)
    upstream = [drawn_like([o])[0], torch.zeros_like(s), torch.zeros_like(z)]
    found = interpreted(by_kernel(args, upstream, keywords), orders=(0,))

    def eager(*given):
        return [eager_bf16(dict(zip(INPUTS, given, strict=True)) | keywords)]

    assert_errs_at_most_twice(found, given_of(gradients(eager, args, upstream[:1])), truth(args, upstream, keywords))


def test_heads_wider_than_its_registers_hold_are_declined():
    q, k, v = (torch.empty(1, 3, 2, dim) for dim in (64, 64, 160))
    assert triton.check_hybrid_backward([q, k, v], (), (), {}) == "head dim 160, at most 128 backward"
    assert triton.check_hybrid_backward([q, k, k], (), (), {}) is None


@pytest.mark.parametrize("used", ["o", "s", "all"])
def test_autograd_of_the_operator_runs_it(monkeypatch, used):
    args, keywords = inputs_of(make_call(batch=1, length=12, window=5))

    def kernel(*given):
        with torch.no_grad(), honest():
            return hybrid_backward.from_autograd(*given)

    def gradients_of_all():
        leaves = [x.clone().requires_grad_(n != 2) if is_float(x) else x for n, x in enumerate(args)]
        outputs = hybrid_chunk(*leaves, **keywords)
        loss = sum(x.sin().sum() for x in ({"o": outputs[:1], "s": outputs[1:2], "all": outputs}[used]))
        return torch.autograd.grad(loss, [x for x in leaves if is_float(x) and x.requires_grad], allow_unused=True)

    expected = gradients_of_all()
    monkeypatch.setitem(BACKWARDS, ("hybrid_chunk", "cpu"), Backward(lambda *_: True, kernel))
    for a, b in zip(gradients_of_all(), expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
