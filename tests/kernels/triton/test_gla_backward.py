"""The Triton backward of `gla_chunk` in the honest interpreter, against autograd through standard operators."""

from __future__ import annotations

import pytest
import torch
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from torch._dynamo.backends.common import aot_autograd

from linearize.kernels import triton
from linearize.kernels.triton import gla_backward
from linearize.ops import gla_chunk
from linearize.ops._backward import BACKWARDS, Backward
from linearize.ops.gla import gla_chunk_recurrence, gla_chunk_streamed
from tests.kernels.triton.checking import (
    SLOW,
    assert_equals_truth,
    assert_errs_at_most_twice,
    doubled,
    gradients,
    interpreted,
    terms_of_gates,
)
from tests.kernels.triton.shim import honest
from tests.kernels.triton.test_gla import eager_bf16, inputs
from tests.ops.test_gla import calls


def by_autograd(args, do, ds, scale):
    """Gradients of the inputs that are given, in float64."""
    leaves = [None if x is None else x.detach().double().requires_grad_() for x in args]
    o, s = gla_chunk_streamed(*leaves, scale=scale)
    given = [x for x in leaves if x is not None]
    grads = iter(torch.autograd.grad([o, s], given, [do.double(), ds.double()]))
    return [None if x is None else next(grads) for x in leaves]


def upstream(args, seed=1):
    q, v = args[0], args[2]
    generator = torch.Generator().manual_seed(seed)
    states = args[2].shape[2] if args[3] is None else args[3].shape[2]
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    do = torch.randn(*q.shape[:3], v.shape[3], generator=generator, dtype=torch.float64).to(q.dtype)
    return do, torch.randn(q.shape[0], states, q.shape[3], v.shape[3], generator=generator, dtype=wide)


def given_of(found):
    return [x for x in found if x is not None]


@settings(max_examples=5, **SLOW)
@given(calls().filter(lambda call: call[0][0].shape[1] <= 140))
def test_the_backward_equals_autograd(call):
    args, keywords = call
    args = (*args[:3], None if args[3] is None else args[3].clamp(min=-80), args[4])
    do, ds = upstream(args)
    found = interpreted(lambda: given_of(gla_backward.gla_backward(*args, do, ds, keywords["scale"])), orders=(0,))
    expected = given_of(by_autograd(args, do, ds, keywords["scale"]))
    assert len(found) == len(expected)
    _, s = gla_chunk_recurrence(*doubled(args), scale=keywords["scale"])
    terms = terms_of_gates(*zip(args[:2], expected[:2], strict=True), (s.flatten(2), ds.flatten(2)))
    assert_equals_truth(found, expected, args[0].dtype, terms)


def test_the_order_of_the_programs_does_not_show():
    args = inputs(torch.float64, length=70, key_dim=33, value_dim=40)
    args = tuple(x[:1] for x in args)
    do, ds = upstream(args)
    found = interpreted(lambda: gla_backward.gla_backward(*args, do, ds, 0.2))
    assert_equals_truth(found, by_autograd(args, do, ds, 0.2), torch.float64)


def test_gates_that_need_no_gradient_cost_none():
    args = inputs(torch.float64, length=20)
    do, ds = upstream(args)
    found = interpreted(lambda: given_of(gla_backward.gla_backward(*args, do, None, 0.2, gates=False)), orders=(0,))
    expected = by_autograd(args, do, torch.zeros_like(ds), 0.2)
    assert_equals_truth(found, [*expected[:3], expected[4]], torch.float64)


@pytest.mark.parametrize("kind", ["gentle", "mixed"])
def test_bfloat16_errs_at_most_twice_as_much_as_pytorch_does(kind):
    args = inputs(torch.bfloat16, length=100, kind=kind)
    do, ds = upstream(args)
    found = interpreted(lambda: gla_backward.gla_backward(*args, do, torch.zeros_like(ds), 0.2), orders=(0,))
    eager = gradients(lambda *given: [eager_bf16(*given, scale=0.2)], args, [do])
    assert_errs_at_most_twice(found, eager, by_autograd(args, do, torch.zeros_like(ds), 0.2))


@pytest.mark.parametrize("state", [True, False])
@pytest.mark.parametrize("used", ["o", "s", "both"])
def test_autograd_of_the_operator_runs_it(monkeypatch, state, used):
    """The operator's backward takes the kernel that is registered for the device, here for the CPU."""
    args = inputs(torch.float64, length=20)
    args = args if state else args[:3]
    calls_made = []

    def kernel(*given):
        calls_made.append(given)
        with torch.no_grad(), honest():
            return gla_backward.from_autograd(*given)

    def gradients():
        leaves = [x.clone().requires_grad_(n != 1) for n, x in enumerate(args)]
        o, s = gla_chunk(*leaves, scale=0.2)
        loss = (o.sin().sum() if used != "s" else 0) + (s.sin().sum() if used != "o" else 0)
        wanted = [x for x in leaves if x.requires_grad]
        return torch.autograd.grad(loss, wanted, allow_unused=used == "s")

    expected = gradients()
    assert not calls_made
    monkeypatch.setitem(BACKWARDS, ("gla_chunk", "cpu"), Backward(lambda *_: True, kernel))
    for a, b in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(a, torch.zeros_like(a) if b is None else b)
    assert len(calls_made) == 1


def test_float64_and_wide_heads_are_declined():
    wide = [torch.empty(1, 3, 2, 8, dtype=torch.float64)] * 3
    assert triton.check_backward(wide, (), (), {}) == "torch.float64: Triton kernels accumulate in float32"
    assert triton.check_backward([torch.empty(1, 3, 2, 300)] * 3, (), (), {}) == "head dim 300, at most 256"
    assert triton.check_backward([torch.empty(1, 3, 2, 8)] * 3, (), (), {}) is None


def test_in_a_compiled_graph_the_backward_is_one_node_that_runs_the_kernel(monkeypatch):
    """Its launches cannot be traced: the compiler sees `linearize::gla_chunk_backward` and no more."""
    args, calls_made, graphs = inputs(torch.float64, length=20), [], []

    def kernel(*given):
        calls_made.append(given)
        with torch.no_grad(), honest():
            return gla_backward.from_autograd(*given)

    def loss(q, k, v, g, s0):
        o, s = gla_chunk(q, k, v, g, s0, scale=0.2)
        return o.sin().sum() + s.sin().sum()

    def gradients_of(form):
        leaves = [x.clone().requires_grad_(n != 1) for n, x in enumerate(args)]
        return torch.autograd.grad(form(*leaves), [x for x in leaves if x.requires_grad])

    expected = gradients_of(loss)
    monkeypatch.setitem(BACKWARDS, ("gla_chunk", "cpu"), Backward(lambda *_: True, kernel))

    def keep(graph, _):
        graphs.append(graph)
        return make_boxed_func(graph)

    backend = aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph), bw_compiler=keep)
    found = gradients_of(torch.compile(loss, fullgraph=True, backend=backend))
    torch.testing.assert_close(found, expected)
    assert len(calls_made) == 1
    (graph,) = graphs
    assert [str(node.target) for node in graph.graph.nodes if "linearize" in str(node.target)] == [
        "linearize.gla_chunk_backward.default"
    ]
