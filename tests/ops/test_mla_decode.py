"""`linearize::mla_decode`: softmax over a row's own part of a latent cache; parts can be read apart and joined."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linearize.kernels  # noqa: F401  (the operator then runs its CPU kernel)
from linearize.ops import OPERATORS, OperatorError, attention, mla_decode
from tests.ops.helpers import assert_near

OPERATOR = OPERATORS["mla_decode"]
FORMS = {"reference": OPERATOR.reference, "operator": mla_decode}


@st.composite
def calls(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    batch, heads, length = draw(st.integers(1, 3)), draw(st.sampled_from([1, 4])), draw(st.integers(1, 100))
    rank, rope = draw(st.sampled_from([(8, 4), (33, 5), (16, 0), (100, 8)]))
    q = torch.randn(batch, heads, rank + rope, generator=generator, dtype=dtype)
    cache = torch.randn(batch, length, rank + rope, generator=generator, dtype=dtype)
    lens = torch.randint(1, length + 1, (batch,), generator=generator) if draw(st.booleans()) else None
    return (q, cache, lens), {"rank": rank, "scale": (rank + rope) ** -0.5}


@settings(max_examples=40)
@given(calls())
def test_every_form_equals_the_truth(call):
    args, keywords = call
    expected = OPERATOR.recurrence(*args, **keywords)
    for form in FORMS.values():
        assert_near(form(*args, **keywords), expected)


@pytest.mark.parametrize("form", FORMS)
def test_it_is_attention_with_one_kv_head_whose_values_are_its_keys_first_dims(form):
    q, cache = torch.randn(2, 4, 12).double(), torch.randn(2, 9, 12).double()
    expected = attention(q.unsqueeze(2), cache.unsqueeze(1), cache[:, None, :, :8], scale=0.3).squeeze(2)
    assert_near(FORMS[form](q, cache, rank=8, scale=0.3)[0], expected)


@pytest.mark.parametrize("form", FORMS)
def test_two_parts_of_a_cache_join_by_their_masses(form):
    q, cache = torch.randn(2, 4, 12).double(), torch.randn(2, 30, 12).double()
    (a, b), whole = (FORMS[form](q, part, rank=8, scale=0.3) for part in cache.split([13, 17], 1)), None
    whole = FORMS[form](q, cache, rank=8, scale=0.3)
    lse = torch.logaddexp(a[1], b[1])
    joined = sum(o * torch.exp(mass - lse).unsqueeze(-1) for o, mass in (a, b))
    assert_near((joined, lse), whole)


@pytest.mark.parametrize("form", FORMS)
def test_a_row_without_tokens_gives_zero_and_what_lies_behind_lens_is_not_read(form):
    q, cache = torch.randn(2, 4, 12), torch.randn(2, 9, 12)
    cache[0, 5:] = 1e30
    o, lse = FORMS[form](q, cache, torch.tensor([5, 0]), rank=8, scale=0.3)
    assert_near((o[:1], lse[:1]), OPERATOR.recurrence(q[:1], cache[:1, :5], rank=8, scale=0.3))
    assert bool((o[1] == 0).all())
    assert bool((lse[1] == float("-inf")).all())


def test_gradients_equal_finite_differences():
    q, cache = torch.randn(2, 2, 5).double().requires_grad_(), torch.randn(2, 6, 5).double().requires_grad_()
    lens = torch.tensor([6, 3])
    assert torch.autograd.gradcheck(lambda q, c: mla_decode(q, c, lens, rank=3, scale=0.5), (q, cache))


def test_dims_that_differ_are_refused():
    with pytest.raises(OperatorError, match="q has 12 dims, the cache 11"):
        mla_decode(torch.randn(1, 2, 12), torch.randn(1, 3, 11), rank=8, scale=1.0)
    with pytest.raises(OperatorError, match="rank is 13, of 12 dims"):
        mla_decode(torch.randn(1, 2, 12), torch.randn(1, 3, 12), rank=13, scale=1.0)
