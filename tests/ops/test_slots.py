"""`linearize::slots_chunk`: every form equals the token loop, splits agree, and merging keeps what it promises."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import linearize.kernels  # noqa: F401  (the operator then runs its CPU kernels)
from linearize.ops import OPERATORS, OperatorError, attention, slots_chunk
from linearize.ops.slot_merge import features, merge, merge_one_by_one, round_sizes

FORMS = {"reference": OPERATORS["slots_chunk"].reference, "operator": slots_chunk}
truth = OPERATORS["slots_chunk"].recurrence
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-11}
STATE = ("ring_k", "ring_v", "slot_k", "slot_v", "slot_n")


def make_call(
    seed=0, dtype=torch.float64, batch=2, length=40, window=3, slots=6, kv_heads=2, group=2, head_dim=4, value_dim=3,
    sinks=0, rounds=1, padding=True, warm=0, decay=1.0,
):  # fmt: skip
    """Keyword arguments of a call; `warm` tokens, a different number in each row, were read before it."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    first = torch.randint(0, length, (batch, 1), generator=generator) * padding
    call = {
        "q": normal(batch, length, kv_heads * group, head_dim),
        "k": normal(batch, length, kv_heads, head_dim),
        "v": normal(batch, length, kv_heads, value_dim),
        "mask": torch.arange(length) >= first,
        "before": torch.zeros(batch, dtype=torch.int64),
        "ring_k": torch.zeros(batch, 2 * window, kv_heads, head_dim, dtype=dtype),
        "ring_v": torch.zeros(batch, 2 * window, kv_heads, value_dim, dtype=dtype),
        "slot_k": torch.zeros(batch, kv_heads, slots, head_dim, dtype=dtype),
        "slot_v": torch.zeros(batch, kv_heads, slots, value_dim, dtype=dtype),
        "slot_n": torch.zeros(batch, kv_heads, slots, dtype=dtype),
        "window": window, "scale": head_dim**-0.5, "sinks": sinks, "rounds": rounds, "decay": decay,
    }  # fmt: skip
    if warm:
        prompt = make_call(seed + 1, dtype, batch, warm, window, slots, kv_heads, group, head_dim, value_dim)
        call = after(call, prompt["mask"], truth(**call | {name: prompt[name] for name in ("q", "k", "v", "mask")}))
    return call


def after(call, mask, outputs):
    """The call with the state that `outputs` left, `mask` having said which of their tokens were real."""
    return call | dict(zip(STATE, outputs[1:], strict=True)) | {"before": call["before"] + mask.sum(1)}


def in_pieces(call, pieces):
    outputs, start = [], 0
    for size in pieces:
        part = {name: call[name][:, start : start + size] for name in ("q", "k", "v", "mask")}
        result = slots_chunk(**call | part)
        outputs.append(result[0])
        call, start = after(call, part["mask"], result) | {name: call[name] for name in part}, start + size
    return (torch.cat(outputs, 1), *result[1:])


def assert_near(found, expected, mask):
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert bool(torch.isfinite(a).all())
        a, b = (a[mask], b[mask]) if i == 0 else (a, b)
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[b.dtype])


@st.composite
def calls(draw, dtype=torch.float64):
    window, sinks = draw(st.integers(1, 9)), draw(st.integers(0, 3))
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 2), (1, 4)]))
    return make_call(
        seed=draw(st.integers(0, 2**20)), dtype=dtype, batch=draw(st.integers(1, 3)), window=window,
        kv_heads=kv_heads, group=group, length=draw(st.one_of(st.just(1), st.integers(1, 40))),
        slots=draw(st.integers(max(1, 2 * sinks), 12)), sinks=sinks, rounds=draw(st.sampled_from([1, 2, 5])),
        padding=draw(st.booleans()), warm=draw(st.sampled_from([0, 7, 30])), decay=draw(st.sampled_from([1.0, 0.75])),
    )  # fmt: skip


@settings(max_examples=20)
@given(calls())
def test_every_form_equals_the_recurrence(call):
    expected = truth(**call)
    for form in FORMS.values():
        assert_near(form(**call), expected, call["mask"])


@settings(max_examples=8)
@given(calls(), st.integers(1, 7))
def test_pieces_and_single_steps_equal_one_call(call, piece):
    length = call["q"].shape[1]
    expected = slots_chunk(**call)
    for size in (piece, 1):
        whole, rest = divmod(length, size)
        assert_near(in_pieces(call, [size] * whole + [rest] * bool(rest)), expected, call["mask"])


@settings(max_examples=15)
@given(calls(dtype=torch.float32), st.integers(1, 9))
def test_in_float32_pieces_and_steps_in_c_equal_the_recurrence(call, piece):
    """Merges may differ where costs nearly tie, so tokens are drawn on a coarse grid, where sums are exact."""
    for name in ("q", "k", "v"):
        call[name] = (4 * call[name]).round() / 4
    length = call["q"].shape[1]
    expected = truth(**call)
    assert_near(slots_chunk(**call), expected, call["mask"])
    for size in (piece, 1):
        whole, rest = divmod(length, size)
        assert_near(in_pieces(call, [size] * whole + [rest] * bool(rest)), expected, call["mask"])


@settings(max_examples=20)
@given(calls().filter(lambda call: call["decay"] == 1.0))
def test_every_token_is_counted_once(call):
    n = slots_chunk(**call)[-1]
    joined = ((call["before"] + call["mask"].sum(1)) // call["window"] - 1).clamp(min=0) * call["window"]
    torch.testing.assert_close(n.sum(-1), joined[:, None].expand(-1, n.shape[1]).double())
    assert bool((n[..., : call["sinks"]] <= 1).all())


@pytest.mark.parametrize("form", FORMS)
def test_while_the_context_fits_it_is_causal_softmax(form):
    call = make_call(length=6 + 3, window=3, slots=6, padding=False)
    o = FORMS[form](**call)[0]
    q, k, v = (call[name].transpose(1, 2) for name in "qkv")
    expected = attention(q, k, v, scale=call["scale"], causal=True).transpose(1, 2)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_equal_keys_merge_without_loss_whatever_their_values(form):
    call = make_call(length=20, window=4, slots=8, rounds=2, padding=False)
    call["k"] = call["k"][:, ::2].repeat_interleave(2, dim=1)
    o, *_, n = FORMS[form](**call)
    assert n.max() == 2
    q, k, v = (call[name].transpose(1, 2) for name in "qkv")
    expected = attention(q, k, v, scale=call["scale"], causal=True).transpose(1, 2)
    torch.testing.assert_close(o, expected, rtol=0, atol=1e-10)


def test_with_decay_only_what_is_older_than_the_slots_are_many_weighs_less():
    call = make_call(length=60, window=4, slots=8, padding=False, sinks=2, decay=0.5)
    n = slots_chunk(**call)[-1]
    torch.testing.assert_close(n[..., :2], torch.ones_like(n[..., :2]))
    held = 6.0  # besides the two sinks, when the slots were first full
    for _ in range(56 // 4 - 2):
        held = held / 2 + 4
    torch.testing.assert_close(n.sum(-1), torch.full_like(n[..., 0], 2 + held))


def test_a_step_that_completes_no_block_leaves_the_slots():
    call = make_call(length=1, window=5, warm=30, padding=False, batch=1)
    call["before"] = torch.tensor([32])
    outputs = slots_chunk(**call)
    for name, tensor in zip(STATE[2:], outputs[3:], strict=True):
        assert torch.equal(tensor, call[name])
        assert tensor.data_ptr() != call[name].data_ptr()
    call["before"] = torch.tensor([34])
    assert not torch.equal(slots_chunk(**call)[3], call["slot_k"])


def test_the_states_are_not_the_callers():
    call = make_call(warm=30)
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    for form in FORMS.values():
        for output in form(**call):
            output.fill_(7)
    for name, value in before.items():
        assert torch.equal(call[name], value)


def test_bfloat16_inputs_keep_float32_slots():
    call = make_call(dtype=torch.float32, length=50, window=8, slots=12, padding=False)
    low = call | {name: call[name].bfloat16() for name in ("q", "k", "v", "ring_k", "ring_v")}
    for form in FORMS.values():
        outputs = form(**low)
        assert [x.dtype for x in outputs] == [torch.bfloat16] * 3 + [torch.float32] * 3
        assert bool(torch.isfinite(outputs[0]).all())
    exact = {name: x.float() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in low.items()}
    torch.testing.assert_close(outputs[0].float(), truth(**exact)[0], rtol=2e-2, atol=2e-2)


def test_gradients_equal_finite_differences():
    call = make_call(batch=1, length=5, window=1, slots=2, kv_heads=1, head_dim=2, value_dim=2, padding=False)
    tensors = [call[name].requires_grad_() for name in "qkv"]

    def function(q, k, v):
        o, *_, slot_k, slot_v, _ = slots_chunk(**call | {"q": q, "k": k, "v": v})
        return o, slot_k, slot_v

    assert torch.autograd.gradcheck(function, tensors)


@pytest.mark.parametrize("rounds", [1, 3])
def test_merging_equals_the_plain_loop_with_empty_places_and_sinks(rounds):
    generator = torch.Generator().manual_seed(rounds)
    for slots, items, sinks in ((1, 7, 0), (5, 8, 0), (6, 24, 2), (9, 12, 3)):
        k, v = (torch.randn(1, 2, items, size, generator=generator, dtype=torch.float64) for size in (4, 3))
        n = torch.randint(0, 4, (1, 2, items), generator=generator).double()
        sizes = round_sizes(items, slots, sinks, rounds)
        y = features(k, v, None, torch.ones(2, dtype=torch.float64))
        found = merge(k, v, n, y, sizes, sinks)
        for g in range(2):
            expected = merge_one_by_one(k[0, g], v[0, g], n[0, g], y[0, g], sizes, sinks)
            for a, b in zip(found, expected, strict=True):
                torch.testing.assert_close(a[0, g], b)


def test_too_few_slots_for_the_sinks_are_refused():
    call = make_call(slots=3)
    with pytest.raises(OperatorError, match="3 slots are too few to keep 2 sinks; give 4"):
        slots_chunk(**call | {"sinks": 2})


def test_a_ring_of_another_size_is_refused():
    call = make_call(window=3)
    with pytest.raises(OperatorError, match="the ring holds 6 tokens, not two blocks of 4"):
        slots_chunk(**call | {"window": 4})
