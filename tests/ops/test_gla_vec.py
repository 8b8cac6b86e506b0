"""`linearize::gla_vec_chunk`: every form equals the token loop, splits agree, gates down to -80 a step do no harm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linearize.kernels.cpu import gla_vec as cpu
from linearize.ops import OperatorError, gla_chunk, gla_vec_chunk
from tests.ops.helpers import (
    GATES,
    assert_every_form_is_the_recurrence,
    assert_near,
    assert_pieces_equal_one_call,
    assert_rows_do_not_meet,
    cut,
    draw_tokens,
)


@st.composite
def calls(draw):
    """(args, keywords): T from 1 to 150, GQA and MQA, gates per kv head or per query head, with and without a state."""
    x = draw_tokens(draw)
    s0 = x.state() if draw(st.booleans()) else None
    keywords = {"scale": x.q.shape[3] ** -0.5, "chunk": draw(st.sampled_from([5, 16, 64]))}
    return (x.q, x.k, x.v, x.gates(draw(st.sampled_from(GATES)), by_channel=True), s0), keywords


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_every_form_equals_the_recurrence(call):
    assert_every_form_is_the_recurrence("gla_vec_chunk", *call)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.floats(0, 1))
def test_two_pieces_equal_one(call, fraction):
    assert_pieces_equal_one_call("gla_vec_chunk", *call, cut(call[0][0].shape[1], fraction))


@pytest.mark.parametrize("state_heads", [2, 4])
def test_single_steps_equal_one_call(state_heads):
    torch.manual_seed(0)
    tokens = torch.randn(3, 40, 4, 8), torch.randn(3, 40, 2, 8), torch.randn(3, 40, 2, 5)
    tokens = (*tokens, -torch.rand(3, 40, state_heads, 8))
    assert_pieces_equal_one_call("gla_vec_chunk", (*tokens, None), {}, [1] * 40)


def test_equal_gates_in_all_channels_are_the_scalar_gate():
    torch.manual_seed(0)
    q, k, g, s0 = torch.randn(2, 50, 4, 8), torch.randn(2, 50, 2, 8), -torch.rand(2, 50, 2), torch.randn(2, 2, 8, 8)
    assert_near(gla_vec_chunk(q, k, k, g[..., None].expand(-1, -1, -1, 8), s0), gla_chunk(q, k, k, g, s0))


def test_rows_of_a_batch_do_not_meet():
    q, g = torch.randn(3, 40, 2, 8).double(), -torch.rand(3, 40, 2, 8).double()
    assert_rows_do_not_meet(cpu.stream, (q, q, q, g))


def test_empty_tokens_leave_the_state_as_it_is():
    k, s0 = torch.zeros(1, 7, 2, 4), torch.randn(1, 2, 4, 4)
    for length in (1, 7):
        _, s = gla_vec_chunk(k[:, :length], k[:, :length], torch.ones(1, length, 2, 4), k[:, :length], s0)
        assert torch.equal(s, s0)
        s.zero_()
        assert s0.any()


@pytest.mark.parametrize(("state_heads", "length"), [(2, 5), (4, 5), (4, 1)])
def test_gradients_equal_finite_differences(state_heads, length):
    torch.manual_seed(0)
    args = [torch.randn(1, length, h, 3, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    g = (-torch.rand(1, length, state_heads, 3, dtype=torch.float64)).requires_grad_()
    s0 = torch.randn(1, state_heads, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *tensors: gla_vec_chunk(*tensors, scale=0.5, chunk=2), (*args, g, s0))


def test_gradients_are_finite_with_steep_gates():
    q, k, v = (torch.randn(1, 100, 2, 4, requires_grad=True) for _ in range(3))
    g = torch.full((1, 100, 2, 4), -80.0, requires_grad=True)
    o, s = gla_vec_chunk(q, k, v, g)
    for gradient in torch.autograd.grad(o.sum() + s.sum(), (q, k, v, g)):
        assert gradient.isfinite().all()


def test_bfloat16_inputs_keep_a_float32_state():
    q, k, v = (torch.randn(1, 40, 2, 8).bfloat16() for _ in range(3))
    for piece in (40, 1):
        o, s = gla_vec_chunk(q[:, :piece], k[:, :piece], v[:, :piece], -torch.rand(1, piece, 2, 8))
        assert (o.dtype, s.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize(
    ("gates", "message"), [((1, 2, 3, 8), "gates for 3 heads: give 2 or 4"), ((1, 2, 2, 7), "differ in channels")]
)
def test_gates_that_do_not_fit_are_refused(gates, message):
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 2, 8)
    with pytest.raises(OperatorError, match=message):
        gla_vec_chunk(q, k, k, torch.zeros(gates))
