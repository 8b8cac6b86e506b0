"""Rows by the matrix of their group: the forms agree, gradients are right, misuse is named."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.fx.experimental.proxy_tensor import make_fx

from linearize.ops import OPERATORS, OperatorError, grouped_mm

operator = OPERATORS["grouped_mm"]
sizes = st.lists(st.integers(0, 4), min_size=1, max_size=5)


def tensors(groups, rest=0, dtype=torch.float32, transposed=False):
    """x with `groups[e]` rows in group e and `rest` rows in none, the matrices 3 x 2, and the ends."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(groups), 2, 3) if transposed else (len(groups), 3, 2)
    x = torch.randn(sum(groups) + rest, 3, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    return x, weight, torch.tensor(groups).cumsum(0).int()


@settings(deadline=None, max_examples=40)
@given(sizes, st.integers(0, 3), st.booleans())
def test_every_form_equals_the_row_loop(groups, rest, transposed):
    x, weight, ends = tensors(groups, rest, transposed=transposed)
    expected = operator.recurrence(x, weight, ends, transposed=transposed)
    for form in (grouped_mm, operator.reference):
        torch.testing.assert_close(form(x, weight, ends, transposed=transposed), expected)
    assert expected.shape == (sum(groups) + rest, 2)
    assert not expected[sum(groups) :].any()


def test_few_rows_gather_their_matrices_and_many_do_not():
    weight, ends = torch.randn(8, 3, 2), torch.tensor([0, 1, 1, 1, 1, 1, 1, 2])
    with torch.no_grad():
        for rows, gathers in ((2, True), (30, False)):
            graph = make_fx(lambda x: operator.reference(x, weight, ends))(torch.randn(rows, 3))
            assert any(node.target is torch.ops.aten.index.Tensor for node in graph.graph.nodes) == gathers


@pytest.mark.parametrize("transposed", [False, True])
def test_gradients_are_those_of_the_row_loop(transposed):
    x, weight, ends = tensors([2, 0, 1], 1, torch.float64, transposed)
    leaves = x.requires_grad_(), weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda x, weight: grouped_mm(x, weight, ends, transposed=transposed), leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, e: (x[:, :2], w, e), "x has 2 columns, weight 3 rows"),
        (lambda x, w, e: (x, w, e[:1]), "1 ends for 2 matrices"),
        (lambda x, w, e: (x[0], w, e), "x has rank 1, weight 3; not 2 and 3"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    with torch._subclasses.FakeTensorMode(), pytest.raises(OperatorError, match=message):
        grouped_mm(*change(*tensors([1, 2])))
