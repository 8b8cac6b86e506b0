"""`linearize::gla_chunk`: every form equals the token loop, splits agree, gates down to -80 a step do no harm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linearize.ops import OperatorError, gla_chunk
from tests.ops.helpers import (
    GATES,
    assert_every_form_is_the_recurrence,
    assert_pieces_equal_one_call,
    cut,
    draw_tokens,
)

LARGE = ((8, 8), (16, 9), (33, 64), (100, 8))


@st.composite
def calls(draw):
    """(args, keywords): T from 1 to 200, GQA and MQA, gates per kv head or per query head, with and without a state."""
    kind = draw(st.sampled_from(["none", *GATES]))
    heads = ((1, 1), (2, 1), (2, 2), (1, 4), (2, 4))
    x = draw_tokens(draw, longest=200, dims=LARGE, heads=heads, shared=kind == "none")
    s0 = x.state() if draw(st.booleans()) else None
    keywords = {"scale": x.q.shape[3] ** -0.5, "chunk": draw(st.sampled_from([16, 64]))}
    return (x.q, x.k, x.v, x.gates(kind), s0), keywords


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_every_form_equals_the_recurrence(call):
    assert_every_form_is_the_recurrence("gla_chunk", *call)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.floats(0, 1))
def test_two_pieces_equal_one(call, fraction):
    assert_pieces_equal_one_call("gla_chunk", *call, cut(call[0][0].shape[1], fraction))


@pytest.mark.parametrize("state_heads", [None, 2, 4])
def test_single_steps_equal_one_call(state_heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 70, 4, 8), torch.randn(3, 70, 2, 8), torch.randn(3, 70, 2, 5)
    g = None if state_heads is None else -torch.rand(3, 70, state_heads)
    assert_pieces_equal_one_call("gla_chunk", (q, k, v, g, None), {}, [1] * 70)


def test_the_state_is_not_the_callers():
    q, s0 = torch.randn(1, 3, 2, 4), torch.randn(1, 2, 4, 4)
    before = s0.clone()
    _, s = gla_chunk(q, q, q, None, s0)
    s.zero_()
    assert torch.equal(s0, before)


def test_bfloat16_inputs_keep_a_float32_state():
    q, k, v = (torch.randn(1, 40, 2, 8).bfloat16() for _ in range(3))
    for piece in (40, 1):
        o, s = gla_chunk(q[:, :piece], k[:, :piece], v[:, :piece], -torch.rand(1, piece, 2))
        assert (o.dtype, s.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(("state_heads", "length"), [(None, 5), (2, 5), (4, 5), (4, 1)])
def test_gradients_equal_finite_differences(state_heads, length):
    torch.manual_seed(0)
    args = [torch.randn(1, length, h, 3, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    g = None if state_heads is None else (-torch.rand(1, length, state_heads, dtype=torch.float64)).requires_grad_()
    s0 = torch.randn(1, state_heads or 2, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *tensors: gla_chunk(*tensors, scale=0.5, chunk=2), (*args, g, s0))


def test_gradients_are_finite_with_steep_gates():
    q, k, v = (torch.randn(1, 100, 2, 4, requires_grad=True) for _ in range(3))
    g = torch.full((1, 100, 2), -80.0, requires_grad=True)
    o, s = gla_chunk(q, k, v, g)
    for gradient in torch.autograd.grad(o.sum() + s.sum(), (q, k, v, g)):
        assert gradient.isfinite().all()


def test_a_wrong_number_of_gates_is_refused():
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 2, 8)
    with pytest.raises(OperatorError, match="3 gates a token: give 2 or 4"):
        gla_chunk(q, k, k, torch.zeros(1, 2, 3))
