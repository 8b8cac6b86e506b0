"""Merging of full slots on CPU: the C function, torch operators and the operator's own text agree."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from linearize.kernels.cpu import native
from linearize.kernels.cpu.slot_merge import merge_by_index, merge_full
from linearize.ops.slot_merge import features, merge, round_sizes


@settings(max_examples=60)
@given(
    st.integers(0, 3),
    st.integers(0, 60),
    st.integers(1, 40),
    st.integers(1, 4),
    st.integers(1, 20),
    st.integers(0, 999),
)
def test_every_way_to_merge_full_slots_agrees(sinks, more, window, rounds, dim, seed):
    generator = torch.Generator().manual_seed(seed)
    slots = max(1, 2 * sinks) + more
    x = torch.randn(2, 2, slots + window, dim + 3, generator=generator)
    n = torch.randint(1, 5, (2, 2, slots + window), generator=generator).float()
    sizes = round_sizes(slots + window, slots, sinks, rounds)
    k, v = x.split([dim, 3], dim=-1)
    k, v, expected_n = merge(k, v, n, features(k, v), sizes, sinks)
    expected = torch.cat([k, v], dim=-1), expected_n
    for found in (
        merge_by_index(x, n, dim, sizes, sinks),
        merge_full(x.clone(), n.clone(), dim, sizes, sinks),
    ):
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_more_items_than_products_are_carried_of_merge_alike():
    """Above 1,024 items each round makes its own products."""
    generator = torch.Generator().manual_seed(0)
    x, n = torch.randn(1, 1, 1100, 7, generator=generator), torch.ones(1, 1, 1100)
    expected = merge_by_index(x, n, 4, [1080, 1068], 1)
    for a, b in zip(merge_full(x.clone(), n.clone(), 4, [1080, 1068], 1), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_where_a_compiler_is_the_c_function_is_used():
    built = native.library("slots")
    assert built is None or built.merge_full is not None


@pytest.mark.parametrize(("name", "value"), [("LINEARIZE_NATIVE", "0"), ("CC", "/no/such/compiler")])
def test_without_a_compiler_there_is_no_library_and_merging_goes_on(monkeypatch, tmp_path, name, value):
    monkeypatch.delenv("LINEARIZE_NATIVE", raising=False)
    monkeypatch.setenv(name, value)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    reason = native.load.__wrapped__("slots")
    assert value in reason or name in reason
    monkeypatch.setattr("linearize.kernels.cpu.slot_merge.library", lambda _: None)
    x, n = torch.randn(1, 1, 12, 4), torch.ones(1, 1, 12)
    sums = (
        merge_full(x, n, 2, [9, 8], 0)[0] * merge_full(x, n, 2, [9, 8], 0)[1][..., None]
    ).sum(2)
    torch.testing.assert_close(sums, x.sum(2))


def test_a_library_is_built_once_and_found_again(monkeypatch, tmp_path):
    if native.library("slots") is None:
        pytest.skip("no C compiler here: the torch operators are what runs, and the other tests hold them")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not isinstance(native.load.__wrapped__("slots"), str)
    (made,) = (tmp_path / "linearize").glob("slots-*.so")
    stamp = made.stat().st_mtime_ns
    assert not isinstance(native.load.__wrapped__("slots"), str)
    assert made.stat().st_mtime_ns == stamp
