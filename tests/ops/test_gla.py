"""`linearize::gla_chunk`: every form equals the token loop, splits agree, gates down to -80 a step do no harm."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import linearize.kernels  # noqa: F401  (the operator then runs its CPU kernels)
from linearize.ops import OPERATORS, OperatorError, gla_chunk

FORMS = {
    "reference": OPERATORS["gla_chunk"].reference,
    "streamed": OPERATORS["gla_chunk"].streamed,
    "operator": gla_chunk,
}
truth = OPERATORS["gla_chunk"].recurrence
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def assert_near(found, expected):
    """Largest difference of each output relative to its largest value."""
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        scale = max(1.0, b.abs().max().item())
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[b.dtype] * scale)


def make_gates(kind, shape, generator, dtype):
    """Log gates: None, gentle, down to -80 everywhere, -80 at a few tokens among gentle ones, or full resets."""
    gentle = -0.1 * torch.rand(shape, generator=generator, dtype=dtype)
    rare = torch.rand(shape, generator=generator) > 0.9
    return {
        "none": None,
        "gentle": gentle,
        "steep": 800 * gentle,
        "mixed": torch.where(rare, -80.0, gentle).to(dtype),
        "reset": torch.where(rare, float("-inf"), gentle).to(dtype),
    }[kind]


@st.composite
def calls(draw):
    """(args, keywords): T from 1 to 200, GQA and MQA, gates per kv head or per query head, with and without a state."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 4), (2, 4)]))
    batch, length = draw(st.integers(1, 2)), draw(st.one_of(st.just(1), st.integers(1, 200)))
    key_dim, value_dim = draw(st.sampled_from([(8, 8), (16, 9), (33, 64), (100, 8)]))
    heads = kv_heads * group
    kind = draw(st.sampled_from(["none", "gentle", "steep", "mixed", "reset"]))
    state_heads = kv_heads if kind == "none" else draw(st.sampled_from([kv_heads, heads]))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k = normal(batch, length, heads, key_dim), normal(batch, length, kv_heads, key_dim)
    v = normal(batch, length, kv_heads, value_dim)
    g = make_gates(kind, (batch, length, state_heads), generator, dtype)
    s0 = normal(batch, state_heads, key_dim, value_dim) if draw(st.booleans()) else None
    return (q, k, v, g, s0), {"scale": key_dim**-0.5, "chunk": draw(st.sampled_from([16, 64]))}


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_every_form_equals_the_recurrence(call):
    args, keywords = call
    expected = truth(*args, **keywords)
    for form in FORMS.values():
        assert_near(form(*args, **keywords), expected)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.floats(0, 1))
def test_two_pieces_equal_one(call, fraction):
    (q, k, v, g, s0), keywords = call
    length = q.shape[1]
    cut = min(length - 1, int(fraction * length))
    pieces, state = [], s0
    for part in (slice(0, cut), slice(cut, length)):
        if part.stop > part.start:
            gates = None if g is None else g[:, part]
            o, state = gla_chunk(q[:, part], k[:, part], v[:, part], gates, state, **keywords)
            pieces.append(o)
    assert_near((torch.cat(pieces, 1), state), gla_chunk(q, k, v, g, s0, **keywords))


@pytest.mark.parametrize("state_heads", [None, 2, 4])
def test_single_steps_equal_one_call(state_heads):
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 70, 4, 8), torch.randn(3, 70, 2, 8), torch.randn(3, 70, 2, 5)
    g = None if state_heads is None else -torch.rand(3, 70, state_heads)
    outputs, state = [], None
    for t in range(70):
        now = slice(t, t + 1)
        o, state = gla_chunk(q[:, now], k[:, now], v[:, now], None if g is None else g[:, now], state)
        outputs.append(o)
    assert_near((torch.cat(outputs, 1), state), gla_chunk(q, k, v, g))


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
