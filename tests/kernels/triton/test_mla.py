"""The Triton kernels of `mla_decode` in the honest interpreter: parts of a cache and their joining."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from linearize.kernels.triton import mla
from linearize.ops.mla_decode import mla_decode_decomposed, mla_decode_recurrence
from tests.kernels.triton.checking import assert_equals_truth, doubled, interpreted, rms
from tests.ops.test_mla_decode import calls


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_it_equals_the_truth(call):
    args, keywords = call
    found = interpreted(lambda: mla.mla_decode(*args, **keywords), orders=(0,))
    assert_equals_truth(found, mla_decode_recurrence(*doubled(args), **keywords), args[0].dtype)


@pytest.mark.parametrize("splits", [1, 3])
def test_any_number_of_parts_gives_the_same(monkeypatch, splits):
    monkeypatch.setattr(mla, "split_count", lambda *args: splits)
    q, cache = torch.randn(2, 20, 24).double(), torch.randn(2, 70, 24).double()
    lens = torch.tensor([70, 1])
    found = interpreted(lambda: mla.mla_decode(q, cache, lens, rank=16, scale=0.2))
    assert_equals_truth(found, mla_decode_recurrence(q, cache, lens, rank=16, scale=0.2), torch.float64)


def test_a_row_without_tokens_gives_zero_and_what_lies_behind_lens_is_not_read():
    q, cache = torch.randn(2, 4, 12), torch.randn(2, 40, 12)
    cache[0, 5:] = float("nan")
    o, lse = interpreted(lambda: mla.mla_decode(q, cache, torch.tensor([5, 0]), rank=8, scale=0.3), orders=(0,))
    expected = mla_decode_recurrence(q[:1], cache[:1, :5], rank=8, scale=0.3)
    assert_equals_truth((o[:1], lse[:1]), expected, torch.float32)
    assert (o[1] == 0).all()
    assert (lse[1] == float("-inf")).all()


def test_bfloat16_errs_at_most_twice_as_much_as_pytorch_does():
    q, cache = torch.randn(2, 4, 40).bfloat16(), torch.randn(2, 90, 40).bfloat16()
    o, lse = interpreted(lambda: mla.mla_decode(q, cache, rank=32, scale=0.2), orders=(0,))
    expected = mla_decode_decomposed(q.double(), cache.double(), rank=32, scale=0.2)
    eager = torch.softmax((q * 0.2) @ cache.mT, -1) @ cache[..., :32]
    assert rms(o, expected[0]) < 2 * rms(eager, expected[0])
    assert rms(lse, expected[1]) < 1e-5


def test_parts_fill_the_machine_and_are_never_too_short():
    q = torch.empty(1, 1, 1)
    assert mla.split_count(q, 1, 100) == 1
    assert mla.split_count(q, 1, 32768) == mla.MOST_SPLITS
    assert mla.split_count(q, 128, 32768) == 3
    assert mla.split_count(q, 10_000, 32768) == 1
