"""`linearize::hybrid_ring`: in all forms it is `hybrid_chunk` over the line, and what it carries makes pieces equal."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linearize.kernels import choose
from linearize.kernels.cpu import native
from linearize.ops import OPERATORS, OperatorError, attention, hybrid_ring
from tests.ops.helpers import assert_near

OPERATOR = OPERATORS["hybrid_ring"]
STATE = ("ring_k", "ring_v", "ring_mask", "sink_k", "sink_v", "s0", "z0")
TOKENWISE = ("q", "k", "v", "mask", "positions")


def make_call(seed=0, dtype=torch.float32, batch=2, length=12, window=4, kv_heads=2, group=2, head_dim=8, value_dim=5,
              sinks=0, features=0, logits=0, padding=True):  # fmt: skip
    """Keyword arguments of a call from an empty state; rows have padding of random lengths in front."""
    generator = torch.Generator().manual_seed(seed)
    heads = kv_heads * group

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    first = torch.randint(0, length, (batch, 1), generator=generator) * padding
    call = {
        "q": normal(batch, length, heads, head_dim),
        "k": normal(batch, length, kv_heads, head_dim),
        "v": normal(batch, length, kv_heads, value_dim),
        "mask": torch.arange(length) >= first,
        "positions": torch.arange(length) - first,
        "ring_k": torch.zeros(batch, window, kv_heads, head_dim, dtype=dtype),
        "ring_v": torch.zeros(batch, window, kv_heads, value_dim, dtype=dtype),
        "ring_mask": torch.zeros(batch, window, dtype=torch.bool),
        "window": window, "scale": head_dim**-0.5,
    }  # fmt: skip
    if sinks:
        call["sink_k"] = torch.zeros(batch, sinks, kv_heads, head_dim, dtype=dtype)
        call["sink_v"] = torch.zeros(batch, sinks, kv_heads, value_dim, dtype=dtype)
    if features:
        call |= {"query_map": normal(heads, head_dim, features), "key_map": normal(kv_heads, head_dim, features)}
        call["s0"] = torch.zeros(batch, kv_heads, 2 * features, value_dim, dtype=dtype)
        call["z0"] = torch.zeros(batch, kv_heads, 2 * features, dtype=dtype)
        call["omega"] = normal(heads)
    if logits:
        call["sink_logits"] = normal(heads, logits)
    return call


def in_pieces(call, sizes):
    outputs, start, now = [], 0, call
    for size in sizes:
        part = {name: call[name][:, start : start + size] for name in TOKENWISE}
        o, *state = hybrid_ring(**now | part)
        outputs.append(o)
        now, start = now | {n: x for n, x in zip(STATE, state, strict=True) if n in call}, start + size
    return (torch.cat(outputs, 1), *state)


def agree(found, expected, mask):
    """Outputs of real tokens, and the state as far as it exists: what stands at masked places is no one's."""
    (o, *state), (expected_o, *expected_state) = found, expected
    assert bool(torch.isfinite(o).all())
    assert_near((o[mask],), (expected_o[mask],))
    assert torch.equal(state[2], expected_state[2])
    exists = state[2][:, :, None, None]
    for i, (a, b) in enumerate(zip(state, expected_state, strict=True)):
        if i != 2:
            assert_near((a * exists,) if i < 2 else (a,), (b * exists,) if i < 2 else (b,))


@st.composite
def calls(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 2), (1, 4)]))
    return make_call(
        seed=draw(st.integers(0, 2**20)), dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        batch=draw(st.integers(1, 3)), window=draw(st.integers(1, 9)), kv_heads=kv_heads, group=group,
        length=draw(st.one_of(st.just(1), st.integers(1, 30))), sinks=draw(st.sampled_from([0, 3])),
        features=draw(st.sampled_from([0, 3, 20])), logits=draw(st.sampled_from([0, 2])), padding=draw(st.booleans()),
    )  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_every_form_equals_the_recurrence(call):
    expected = OPERATOR.recurrence(**call)
    for form in (OPERATOR.reference, OPERATOR.streamed, hybrid_ring):
        agree(form(**call), expected, call["mask"])


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.integers(1, 9))
def test_steps_and_pieces_equal_one_call(call, size):
    length = call["q"].shape[1]
    expected = hybrid_ring(**call)
    for piece in (1, size):
        sizes = [min(piece, length - start) for start in range(0, length, piece)]
        agree(in_pieces(call, sizes), expected, call["mask"])


@pytest.mark.parametrize("pieces", [[9], [1] * 9])
def test_window_and_sinks_are_attention_with_that_mask(pieces):
    call = make_call(length=9, window=3, sinks=2, padding=False)
    o = in_pieces(call, pieces)[0]
    i, j = torch.arange(9)[:, None], torch.arange(9)
    seen = (j <= i) & ((i - j < 3) | (j < 2))
    q, k, v = (call[name].transpose(1, 2) for name in "qkv")
    assert_near(o, attention(q, k, v, seen, scale=call["scale"]).transpose(1, 2))


def test_the_state_is_not_the_callers():
    call = make_call(length=1, sinks=2, features=3)
    before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
    for form in (OPERATOR.reference, hybrid_ring):
        for output in form(**call):
            output.zero_()
    for name, value in before.items():
        assert torch.equal(call[name], value)


def test_one_token_in_float32_takes_c_and_everything_else_says_why_not():
    call = make_call(length=1)
    declined = choose("hybrid_ring", "cpu", (), call)[1]
    assert [reason for _, reason in declined] == ([native.missing("hybrid")] if native.missing("hybrid") else [])
    if not native.missing("hybrid"):
        wide = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in call.items()}
        for other, reason in ((make_call(), "T is 12, not 1"), (wide, "torch.float64, not float32")):
            assert choose("hybrid_ring", "cpu", (), other)[1] == [("cpu.hybrid_ring_c", reason)]


def test_gradients_equal_finite_differences():
    call = make_call(batch=1, length=4, window=2, kv_heads=1, head_dim=2, value_dim=2, sinks=1, features=2,
                     dtype=torch.float64, padding=False)  # fmt: skip
    names = ("q", "k", "v", "query_map", "key_map", "omega", "s0", "z0")

    def function(*tensors):
        o, *_, s, z = hybrid_ring(**call | dict(zip(names, tensors, strict=True)))
        return o, s, z

    call["z0"] = call["z0"] + 1
    assert torch.autograd.gradcheck(function, [call[name].requires_grad_() for name in names])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ring_k": torch.zeros(2, 5, 2, 8)}, r"ring|argument 6 has shape \[2, 5, 2, 8\]"),
        ({"query_map": torch.zeros(4, 8, 3)}, r"give both query_map and key_map, or neither"),
        ({"k": torch.zeros(2, 1, 2, 7)}, r"argument 2 has shape \[2, 1, 2, 7\]|Sizes of tensors must match"),
    ],
)
def test_calls_that_do_not_fit_are_refused(change, message):
    with pytest.raises((OperatorError, RuntimeError), match=message):
        hybrid_ring(**make_call(length=1) | change)
