"""The short convolution: its forms agree, pieces equal one call, gradients are right, misuse is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.ops import OPERATORS, OperatorError, short_conv

truth = OPERATORS["short_conv"].recurrence


def tensors(batch=2, length=7, heads=3, dim=4, size=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return tuple(
        torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
        for shape in ((batch, length, heads, dim), (batch, size - 1, heads, dim), (heads, dim, size))
    )


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 3), st.integers(1, 9), st.integers(1, 3), st.integers(2, 5))
def test_the_operator_equals_the_token_loop(batch, length, heads, size):
    given_tensors = tensors(batch, length, heads, 4, size)
    for found, expected in zip(short_conv(*given_tensors), truth(*given_tensors), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cut", [1, 2, 6])
def test_two_pieces_equal_one_call(cut):
    x, state, weight = tensors()
    whole, last = short_conv(x, state, weight)
    first, middle = short_conv(x[:, :cut], state, weight)
    second, end = short_conv(x[:, cut:], middle, weight)
    torch.testing.assert_close(torch.cat([first, second], dim=1), whole)
    torch.testing.assert_close(end, last)


def test_gradients_are_those_of_the_token_loop():
    leaves = [x.requires_grad_() for x in tensors(1, 4, 2, 2, 3, torch.float64)]
    assert torch.autograd.gradcheck(short_conv, leaves)


def test_a_state_of_another_length_is_refused():
    with torch._subclasses.FakeTensorMode():
        x, state, weight = tensors()
        with pytest.raises(OperatorError, match="state holds 1 tokens, not 2"):
            short_conv(x, state[:, 1:], weight)
