"""`linearize::slots_block` and `slots_merge`: each equals its truth, and together they are `slots_chunk`."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linearize.kernels  # noqa: F401  (the operators then run their CPU kernels)
from linearize.kernels import choose
from linearize.ops import OPERATORS, OperatorError, slots_block, slots_chunk, slots_merge
from tests.ops.helpers import assert_near

BLOCK, MERGE = OPERATORS["slots_block"], OPERATORS["slots_merge"]


def draw_slots(generator, dtype, batch, kv_heads, count, dims, empty=0):
    """Slots of counts 1 to 5, the last `empty` of them without tokens."""
    shape = (batch, kv_heads, count)
    k, v = (torch.randn(*shape, dim, generator=generator, dtype=dtype) for dim in dims)
    n = torch.randint(1, 6, shape, generator=generator).to(dtype)
    n[..., count - empty :] = 0
    return k, v, n


@st.composite
def blocks(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 2), (1, 4)]))
    batch, window, dims = draw(st.integers(1, 2)), draw(st.integers(1, 9)), draw(st.sampled_from([(8, 5), (4, 4)]))
    length, count = draw(st.integers(1, window)), draw(st.integers(1, 12))
    slots = draw_slots(generator, dtype, batch, kv_heads, count, dims, draw(st.integers(0, count)))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q = normal(batch, length, kv_heads * group, dims[0])
    k, v = (normal(batch, window + length, kv_heads, dim) for dim in dims)
    mask = torch.rand(batch, window + length, generator=generator) > 0.4 if draw(st.booleans()) else None
    return (q, k, v, *slots, mask), {"window": window, "scale": dims[0] ** -0.5}


@settings(max_examples=40)
@given(blocks())
def test_every_form_of_a_block_equals_the_truth(call):
    args, keywords = call
    expected_o, expected_lse = BLOCK.recurrence(*args, **keywords)
    expected = expected_o.nan_to_num(0.0), expected_lse.clamp(min=-1e30)
    for form in (BLOCK.reference, BLOCK.overload):
        o, lse = form(*args, **keywords)
        assert_near((o, lse.clamp(min=-1e30)), expected)


@pytest.mark.parametrize("form", ["reference", "overload"])
def test_a_slot_of_count_three_is_three_equal_keys(form):
    generator = torch.Generator().manual_seed(0)
    k, v, n = draw_slots(generator, torch.float64, 1, 1, 2, (4, 3))
    n = torch.tensor([[[3.0, 1.0]]], dtype=torch.float64)
    q, line = torch.randn(1, 2, 2, 4).double(), torch.randn(1, 5, 1, 4).double()
    values, repeat = torch.randn(1, 5, 1, 3).double(), torch.tensor([0, 0, 0, 1])
    keywords = {"window": 3, "scale": 0.5}
    merged = getattr(BLOCK, form)(q, line, values, k, v, n, **keywords)
    apart = getattr(BLOCK, form)(
        q, line, values, k[:, :, repeat], v[:, :, repeat], torch.ones(1, 1, 4).double(), **keywords
    )
    assert_near(merged, apart)


def test_gradients_of_a_block_equal_finite_differences():
    generator = torch.Generator().manual_seed(0)
    slots = draw_slots(generator, torch.float64, 1, 1, 3, (2, 2), empty=1)
    line = [torch.randn(1, 4, 1, 2).double() for _ in range(2)]
    inputs = [torch.randn(1, 2, 2, 2).double(), *line, *slots[:2]]

    def call(q, k, v, slot_k, slot_v):
        return slots_block(q, k, v, slot_k, slot_v, slots[2], window=2, scale=0.5)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in inputs])


@st.composite
def merges(draw):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    batch, kv_heads, window = draw(st.integers(1, 2)), draw(st.sampled_from([1, 2])), draw(st.integers(1, 9))
    sinks = draw(st.integers(0, 3))
    count = draw(st.integers(max(1, 2 * sinks), 12))
    slots = draw_slots(generator, dtype, batch, kv_heads, count, (4, 3), draw(st.sampled_from([0, 0, count])))
    k, v = (torch.randn(batch, window, kv_heads, dim, generator=generator, dtype=dtype) for dim in (4, 3))
    metric = torch.randn(kv_heads, 4, 4, generator=generator, dtype=dtype) if draw(st.booleans()) else None
    lam = torch.rand(kv_heads, generator=generator, dtype=dtype) if draw(st.booleans()) else None
    rounds, decay = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1.0, 0.75]))
    return (*slots, k, v, metric, lam), {"sinks": sinks, "rounds": rounds, "decay": decay}


@settings(max_examples=40)
@given(merges())
def test_every_form_of_merging_equals_the_truth(call):
    args, keywords = call
    expected = MERGE.recurrence(*args, **keywords)
    for form in (MERGE.reference, MERGE.overload):
        for a, b in zip(form(*args, **keywords), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-5 if a.dtype == torch.float32 else 1e-11)


def test_with_a_metric_what_it_hides_does_not_keep_keys_apart():
    slot_k = torch.tensor([[[[0.0, 5.0], [0.0, -5.0], [1.0, 0.0]]]]).double()
    metric, k, ones = torch.tensor([[[1.0], [0.0]]]).double(), torch.tensor([[[[9.0, 0.0]]]]).double(), torch.ones
    slot_n = ones(1, 1, 3).double()
    plain = slots_merge(slot_k, slot_k, slot_n, k, k)
    hidden = slots_merge(slot_k, slot_k, slot_n, k, k, metric)
    assert 2.0 not in plain[2][0, 0, :1]
    assert hidden[2][0, 0].tolist() == [2.0, 1.0, 1.0]


def test_block_after_block_they_are_slots_chunk():
    torch.manual_seed(0)
    window, count, blocks_read = 4, 6, 7
    q, k, v = (torch.randn(2, window * blocks_read, heads, 4) for heads in (4, 2, 2))
    ring, slots = torch.zeros(2, 2 * window, 2, 4), (torch.zeros(2, 2, count, 4), torch.zeros(2, 2, count, 4))
    n, policy = torch.zeros(2, 2, count), {"sinks": 1, "rounds": 2, "decay": 0.75}
    mask, before = torch.ones(2, window * blocks_read, dtype=torch.bool), torch.zeros(2, dtype=torch.int64)
    expected = slots_chunk(q, k, v, mask, before, ring, ring, *slots, n, window=window, scale=0.5, **policy)
    line_k, line_v = (torch.nn.functional.pad(x, (0, 0, 0, 0, window, 0)) for x in (k, v))
    state, outputs = (*slots, n), []
    for block in range(blocks_read):
        own, both = slice(block * window, (block + 1) * window), slice(block * window, (block + 2) * window)
        exists = (torch.arange(2 * window) >= window * (block == 0)).expand(2, -1)
        outputs.append(
            slots_block(q[:, own], line_k[:, both], line_v[:, both], *state, exists, window=window, scale=0.5)[0]
        )
        if block:
            left = slice(block * window, (block + 1) * window)  # of the padded line: the block before
            state = slots_merge(*state, line_k[:, left], line_v[:, left], **policy)
    assert_near((torch.cat(outputs, 1), *state), (expected[0], *expected[3:]))


def test_empty_slots_go_to_the_standard_operators():
    k, v, n = draw_slots(torch.Generator().manual_seed(0), torch.float32, 1, 2, 4, (4, 3), empty=1)
    new = torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 3)
    kernel, declined = choose("slots_merge", "cpu", (k, v, n, *new), {})
    assert kernel is None
    assert declined == [("cpu.slots_merge", "a slot is empty")]


def test_calls_that_do_not_fit_are_refused():
    k, v, n = draw_slots(torch.Generator().manual_seed(0), torch.float32, 1, 2, 4, (4, 3))
    with pytest.raises(OperatorError, match=r"k holds 5 keys, not window . T = 3 . 1"):
        slots_block(
            torch.randn(1, 1, 2, 4), torch.randn(1, 5, 2, 4), torch.randn(1, 5, 2, 3), k, v, n, window=3, scale=1
        )
    with pytest.raises(OperatorError, match="4 slots are too few to keep 3 sinks; give 6"):
        slots_merge(k, v, n, torch.randn(1, 2, 2, 4), torch.randn(1, 2, 2, 3), sinks=3)
