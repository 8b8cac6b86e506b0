"""`linearize::attention`: every form equals the token loop, and the corners of its contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import linearize.kernels  # noqa: F401  (the operator then runs its CPU kernels)
from linearize.ops import OPERATORS, OperatorError, attention

FORMS = {
    "reference": OPERATORS["attention"].reference,
    "streamed": OPERATORS["attention"].streamed,
    "operator": attention,
}
truth = OPERATORS["attention"].recurrence
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}


def assert_near(found, expected):
    """Largest difference relative to the largest value of the expected tensor."""
    assert found.dtype == expected.dtype
    scale = max(1.0, expected.abs().max().item())
    torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE[expected.dtype] * scale)


@st.composite
def calls(draw):
    """(args, keywords) of a call of any shape: GQA and MQA, biases of both kinds, sinks, soft-cap, windows."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 4), (2, 4)]))
    batch, length = draw(st.integers(1, 2)), draw(st.one_of(st.just(1), st.integers(1, 200)))
    keys = max(1, length + draw(st.integers(-3, 60)))
    head_dim, value_dim = draw(st.sampled_from([(8, 8), (16, 16), (24, 8), (100, 100)]))
    heads = kv_heads * group

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    bias_shape = draw(
        st.sampled_from([(length, keys), (batch, 1, 1, keys), (1, heads, length, keys), (batch, 1, length, keys)])
    )
    allowed = torch.rand(*bias_shape, generator=generator) > 0.4
    bias = {
        "none": None,
        "float": normal(*bias_shape),
        "bool": allowed,
        "minimum": torch.zeros(*bias_shape, dtype=dtype).masked_fill(~allowed, torch.finfo(dtype).min),
    }[draw(st.sampled_from(["none", "float", "bool", "minimum"]))]
    sinks = normal(heads) if draw(st.booleans()) else None
    keywords = {
        "scale": head_dim**-0.5,
        "softcap": draw(st.sampled_from([0.0, 0.0, 2.0])),
        "causal": draw(st.booleans()),
        "window": draw(st.sampled_from([0, 0, 1, 7, 70])),
    }
    args = normal(batch, heads, length, head_dim), normal(batch, kv_heads, keys, head_dim)
    return (*args, normal(batch, kv_heads, keys, value_dim), bias, sinks), keywords


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_every_form_equals_the_recurrence(call):
    args, keywords = call
    expected = truth(*args, **keywords)
    for form in FORMS.values():
        assert_near(form(*args, **keywords), expected)


@pytest.mark.parametrize("form", FORMS)
def test_rows_with_every_key_masked_are_zero(form):
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 3, 8), torch.ones(1, 1, 3, 8)
    allowed = torch.ones(3, 3, dtype=torch.bool)
    allowed[1] = False
    for bias in (allowed, torch.where(allowed, 0.0, float("-inf")), torch.where(allowed, 0.0, torch.finfo().min)):
        o = FORMS[form](q, k, v, bias, scale=1.0)
        assert (o[:, :, 1] == 0).all()
        torch.testing.assert_close(o[:, :, 0], torch.ones(1, 2, 8))


@pytest.mark.parametrize("form", FORMS)
def test_causal_is_aligned_at_the_lower_right(form):
    q, k, v = torch.randn(1, 1, 2, 8), torch.randn(1, 1, 5, 8), torch.eye(5)[None, None]
    o = FORMS[form](q, k, v, scale=1.0, causal=True)
    assert (o[0, 0, 0] > 0).tolist() == [True, True, True, True, False]
    assert (o[0, 0, 1] > 0).all()
    o = FORMS[form](q, k, v, scale=1.0, causal=True, window=2)
    assert (o[0, 0, 0] > 0).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("form", FORMS)
def test_sinks_only_enlarge_the_denominator(form):
    q, k, v = torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, 3, 8), torch.ones(1, 1, 3, 8)
    o = FORMS[form](q, k, v, None, torch.zeros(1), scale=1.0)
    torch.testing.assert_close(o, torch.full((1, 1, 1, 8), 0.75))


@pytest.mark.parametrize("form", FORMS)
def test_merging_the_heads_of_the_result_is_a_view(form):
    for kv_heads in (1, 4):
        q, k = torch.randn(2, 4, 5, 16), torch.randn(2, kv_heads, 5, 16)
        assert FORMS[form](q, k, k, scale=0.3, causal=True).transpose(1, 2).is_contiguous()


def test_bfloat16_is_softmaxed_in_float32():
    q, k, v = (torch.randn(1, 2, 40, 16).bfloat16() for _ in range(3))
    expected = truth(q.double(), k.double(), v.double(), scale=0.25, causal=True)
    for softcap in (0.0, 1e4):
        o = attention(q, k, v, scale=0.25, causal=True, softcap=softcap)
        assert o.dtype == torch.bfloat16
        torch.testing.assert_close(o.double(), expected, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("mask", ["none", "float", "bool"])
def test_gradients_equal_finite_differences(mask):
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, t, 3, dtype=torch.float64, requires_grad=True) for h, t in ((4, 3), (2, 5), (2, 5)))
    sinks = torch.randn(4, dtype=torch.float64, requires_grad=True)
    bias = {"none": None, "bool": torch.rand(3, 5) > 0.3, "float": torch.randn(1, 1, 3, 5, dtype=torch.float64)}[mask]
    if mask == "float":
        bias.requires_grad_()

    def call(*tensors):
        return attention(*tensors, scale=0.5, softcap=3.0, causal=True, window=3)

    assert torch.autograd.gradcheck(call, (q, k, v, bias, sinks))


def test_the_backward_holds_across_pieces():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, h, 310, 8, dtype=torch.float64, requires_grad=True) for h in (2, 1, 1))
    weight = torch.randn(1, 2, 310, 8, dtype=torch.float64)
    found = torch.autograd.grad((attention(q, k, v, scale=0.3, causal=True, window=50) * weight).sum(), (q, k, v))
    dense = FORMS["reference"](q, k, v, scale=0.3, causal=True, window=50)
    for a, b in zip(found, torch.autograd.grad((dense * weight).sum(), (q, k, v)), strict=True):
        assert_near(a, b)


def test_heads_that_do_not_divide_are_refused():
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 2, 2, 8)
    with pytest.raises(OperatorError, match="3 query heads are no multiple of 2 kv heads"):
        attention(q, k, k, scale=1.0)
