"""What positions add to the scores, against the formula written out."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from linearize.ops.position_bias import position_bias


@given(
    padding=st.integers(0, 4), length=st.integers(5, 12), new=st.integers(1, 5), chunk=st.integers(0, 4),
    moved=st.booleans(), biased=st.booleans(),
)  # fmt: skip
def test_bias_is_the_formula(padding: int, length: int, new: int, chunk: int, moved: bool, biased: bool) -> None:
    seen = torch.ones(2, length, dtype=torch.bool)
    seen[1, :padding] = False
    slopes = torch.tensor([0.5, -0.25, 2.0]) if biased else None
    actual = position_bias(seen, seen[:, length - new :], chunk, slopes, from_first_token=moved)
    actual = actual.expand(-1, -1, new, -1)
    for row, start in ((0, 0), (1, padding)):
        for t in range(new):
            i = length - new + t
            for j in range(length):
                first = start if moved else 0
                visible = j >= start and (chunk == 0 or (i - first) // chunk == (j - first) // chunk)
                if i < start:
                    continue  # padding asks nothing
                if slopes is None:
                    assert bool(actual[row, 0, t, j]) == visible
                elif visible:
                    assert torch.equal(actual[row, :, t, j], slopes * (j - i))
                else:
                    assert bool((actual[row, :, t, j] == float("-inf")).all())
