"""`linearize::delta_chunk`: every form is the token loop, gated or not; the inverse is exact where powers fail."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.export import Dim

from linearize.kernels.cpu import delta as cpu
from linearize.ops import OperatorError, decompositions, delta_chunk
from linearize.ops.delta import EXPORTED_LEVELS, unit_triangular_inverse
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
    """(args, keywords): T to 150, beta up to 2 on normalised keys, gates of every kind, with and without a state."""
    x = draw_tokens(draw)
    # all keys alike: powers of L explode, the rule does not
    k = x.k[:, :1].expand_as(x.k) if draw(st.booleans()) else x.k
    g = x.gates(draw(st.sampled_from(["none", *GATES])))
    beta = draw(st.sampled_from([1.0, 2.0])) * x.uniform(*x.by_state)
    s0 = x.state() if draw(st.booleans()) else None
    keywords = {"scale": x.q.shape[3] ** -0.5, "chunk": draw(st.sampled_from([5, 16, 32])), "l2norm": True}
    return (x.q, k, x.v, beta, g, s0), keywords


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_every_form_equals_the_recurrence(call):
    assert_every_form_is_the_recurrence("delta_chunk", *call)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.floats(0, 1))
def test_two_pieces_equal_one(call, fraction):
    assert_pieces_equal_one_call("delta_chunk", *call, cut(call[0][0].shape[1], fraction))


@pytest.mark.parametrize(("state_heads", "gated"), [(2, False), (2, True), (4, True)])
def test_single_steps_equal_one_call(state_heads, gated):
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 40, heads, dim) for heads, dim in ((4, 8), (2, 8), (2, 5)))
    tokens = (q, k, v, torch.rand(3, 40, state_heads), -torch.rand(3, 40, state_heads) if gated else None)
    assert_pieces_equal_one_call("delta_chunk", (*tokens, None), {"l2norm": True}, [1] * 40)


def test_a_key_written_with_beta_one_is_read_back_whole_and_then_replaced():
    k = torch.nn.functional.normalize(torch.randn(1, 1, 1, 8).double(), dim=-1).expand(1, 3, 1, 8)
    v = torch.randn(1, 3, 1, 5).double()
    o, _ = delta_chunk(k, k, v, torch.ones(1, 3, 1).double())
    torch.testing.assert_close(o, v)


def test_the_inverse_is_exact_for_equal_keys_where_powers_are_lost():
    lower = torch.ones(64, 64).tril(-1)
    exact = torch.eye(64) - torch.eye(64).roll(1, 0).tril(-1)
    assert torch.equal(unit_triangular_inverse(lower), exact)
    power, neumann = -lower, torch.eye(64)
    for _ in range(6):
        neumann, power = neumann + power @ neumann, power @ power
    assert (neumann - exact).abs().max() > 1


@pytest.mark.parametrize("length", [1, 2, 5, 64, 100])
def test_the_inverse_is_that_of_the_unit_triangle(length):
    lower = torch.rand(2, length, length, dtype=torch.float64) / 4
    identity = torch.eye(length, dtype=torch.float64)
    torch.testing.assert_close(unit_triangular_inverse(lower) @ (identity + lower.tril(-1)), identity.expand_as(lower))


def test_an_exported_decomposition_says_nan_beyond_its_longest_piece():
    class Delta(torch.nn.Module):
        def forward(self, k, beta):
            return delta_chunk(k, k, k, beta, l2norm=True)

    k, beta, tokens = torch.randn(1, 300, 1, 4), torch.rand(1, 300, 1), Dim("T", min=1, max=4096)
    shapes = {"k": {1: tokens}, "beta": {1: tokens}}
    exported = torch.export.export(Delta(), (k[:, :9], beta[:, :9]), dynamic_shapes=shapes)
    module = exported.run_decompositions(torch.export.default_decompositions() | decompositions()).module()
    longest = 2**EXPORTED_LEVELS
    whole = k[:, :longest], beta[:, :longest]
    assert_near(module(*whole), Delta()(*whole))
    o, s = module(k, beta)
    assert bool(o[:, longest:].isnan().all())
    assert bool(s.isnan().all())


def test_rows_of_a_batch_do_not_meet():
    q, beta = torch.randn(3, 40, 2, 8).double(), torch.rand(3, 40, 2).double()
    assert_rows_do_not_meet(cpu.stream, (q, q, q, beta, -beta), l2norm=True)


def test_empty_tokens_leave_the_state_as_it_is():
    k, zero, s0 = torch.zeros(1, 7, 2, 4), torch.zeros(1, 7, 2), torch.randn(1, 2, 4, 4)
    for length in (1, 7):
        empty = (k[:, :length], k[:, :length], torch.ones(1, length, 2, 4), zero[:, :length], zero[:, :length])
        _, s = delta_chunk(*empty, s0, l2norm=True)
        assert torch.equal(s, s0)
        s.zero_()
        assert s0.any()


@pytest.mark.parametrize(
    ("state_heads", "length", "gated", "l2norm"),
    [(2, 5, True, True), (4, 5, True, False), (2, 5, False, True), (4, 1, True, True)],
)
def test_gradients_equal_finite_differences(state_heads, length, gated, l2norm):
    torch.manual_seed(0)
    args = [torch.randn(1, length, h, 3, dtype=torch.float64, requires_grad=True) for h in (4, 2, 2)]
    beta = torch.rand(1, length, state_heads, dtype=torch.float64, requires_grad=True)
    g = (-torch.rand(1, length, state_heads, dtype=torch.float64)).requires_grad_() if gated else None
    s0 = torch.randn(1, state_heads, 3, 3, dtype=torch.float64, requires_grad=True)

    def call(*tensors):
        return delta_chunk(*tensors, scale=0.5, chunk=2, l2norm=l2norm)

    assert torch.autograd.gradcheck(call, (*args, beta, g, s0))


def test_gradients_are_finite_with_steep_gates():
    q, k, v = (torch.randn(1, 100, 2, 4, requires_grad=True) for _ in range(3))
    beta, g = torch.rand(1, 100, 2, requires_grad=True), torch.full((1, 100, 2), -80.0, requires_grad=True)
    o, s = delta_chunk(q, k, v, beta, g, l2norm=True)
    for gradient in torch.autograd.grad(o.sum() + s.sum(), (q, k, v, beta, g)):
        assert gradient.isfinite().all()


def test_bfloat16_inputs_keep_a_float32_state():
    q, k, v = (torch.randn(1, 40, 2, 8).bfloat16() for _ in range(3))
    for piece in (40, 1):
        o, s = delta_chunk(q[:, :piece], k[:, :piece], v[:, :piece], torch.rand(1, piece, 2), l2norm=True)
        assert (o.dtype, s.dtype) == (torch.bfloat16, torch.float32)


def test_heads_that_do_not_fit_are_refused():
    q, k = torch.randn(1, 2, 4, 8), torch.randn(1, 2, 2, 8)
    with pytest.raises(OperatorError, match="beta for 3 heads: give 2 or 4"):
        delta_chunk(q, k, k, torch.zeros(1, 2, 3))
    with pytest.raises(OperatorError, match="g must hold 2 heads, as beta does"):
        delta_chunk(q, k, k, torch.zeros(1, 2, 2), torch.zeros(1, 2, 4))
