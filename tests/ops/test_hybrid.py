"""`linearize::hybrid_chunk`: every form equals the token loop, splits agree, the corners equal softmax attention."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import linearize.kernels  # noqa: F401  (the operator then runs its CPU kernels)
from linearize.ops import OPERATORS, OperatorError, attention, hybrid_chunk
from tests.ops.helpers import assert_near

FORMS = {
    "reference": OPERATORS["hybrid_chunk"].reference,
    "streamed": OPERATORS["hybrid_chunk"].streamed,
    "operator": hybrid_chunk,
}
truth = OPERATORS["hybrid_chunk"].recurrence
TOKENWISE = ("q", "fq", "fk", "sink_mask")


def make_call(
    seed=0,
    dtype=torch.float64,
    batch=2,
    length=5,
    window=3,
    kv_heads=2,
    group=2,
    head_dim=8,
    value_dim=6,
    features=7,
    sinks=2,
    logits=2,
    mix=True,
    state=True,
    padding="left",
):
    """Keyword arguments of a call; 0 or False leaves a part out. Features are positive, as feature maps make them."""
    generator = torch.Generator().manual_seed(seed)
    heads, line = kv_heads * group, window + length

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    def uniform(*shape):
        return torch.rand(*shape, generator=generator, dtype=dtype)

    call = {
        "q": normal(batch, length, heads, head_dim),
        "k": normal(batch, line, kv_heads, head_dim),
        "v": normal(batch, line, kv_heads, value_dim),
        "mask": torch.ones(batch, line, dtype=torch.bool),
        "window": window,
        "scale": head_dim**-0.5,
    }
    if padding == "left":
        first = torch.randint(0, line, (batch, 1), generator=generator)
        call["mask"] = torch.arange(line) >= first
    elif padding == "random":
        call["mask"] = uniform(batch, line) > 0.5
    if features:
        call |= {"fq": uniform(batch, length, heads, features), "fk": uniform(batch, length, kv_heads, features)}
    if features and state:
        call |= {"s0": normal(batch, kv_heads, features, value_dim), "z0": 1 + uniform(batch, kv_heads, features)}
    if mix:
        call["mix"] = uniform(heads)
    if sinks:
        call |= {
            "sink_k": normal(batch, sinks, kv_heads, head_dim),
            "sink_v": normal(batch, sinks, kv_heads, value_dim),
        }
        call["sink_mask"] = uniform(batch, length, sinks) > 0.5
    if logits:
        call["sink_logits"] = normal(heads, logits)
    return call


def part_of(call, start, stop, s, z):
    """The call for tokens start..stop, given the states that the tokens before left."""
    part = {name: value[:, start:stop] if name in TOKENWISE else value for name, value in call.items()}
    line = slice(start, stop + call["window"])
    return part | {name: call[name][:, line] for name in ("k", "v", "mask")} | {"s0": s, "z0": z}


@st.composite
def calls(draw):
    """Calls of any shape: T from 1 to 200, w from 1 to 70, GQA and MQA, with and without each optional part."""
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 4), (2, 4)]))
    head_dim, value_dim, features = draw(st.sampled_from([(8, 8, 16), (16, 24, 8), (100, 9, 33), (32, 64, 0)]))
    return make_call(
        seed=draw(st.integers(0, 2**31)),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        batch=draw(st.integers(1, 2)),
        length=draw(st.one_of(st.just(1), st.integers(1, 200))),
        window=draw(st.integers(1, 70)),
        kv_heads=kv_heads,
        group=group,
        head_dim=head_dim,
        value_dim=value_dim,
        features=features,
        sinks=draw(st.sampled_from([0, 1, 4])),
        logits=draw(st.sampled_from([0, 3])),
        mix=draw(st.booleans()),
        state=draw(st.booleans()),
        padding=draw(st.sampled_from(["none", "left", "random"])),
    )


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls())
def test_every_form_equals_the_recurrence(call):
    expected = truth(**call)
    for form in FORMS.values():
        assert_near(form(**call), expected)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.floats(0, 1))
def test_two_pieces_with_the_ring_carried_equal_one(call, fraction):
    length = call["q"].shape[1]
    cut = min(length - 1, int(fraction * length))
    outputs, s, z = [], call.get("s0"), call.get("z0")
    for start, stop in ((0, cut), (cut, length)):
        if stop > start:
            o, s, z = hybrid_chunk(**part_of(call, start, stop, s, z))
            outputs.append(o)
    assert_near((torch.cat(outputs, 1), s, z), hybrid_chunk(**call))


@pytest.mark.parametrize("features", [0, 7])
@pytest.mark.parametrize("sinks", [0, 2])
def test_single_steps_equal_one_call(features, sinks):
    call = make_call(length=70, window=9, features=features, sinks=sinks, logits=sinks, dtype=torch.float32, batch=3)
    outputs, s, z = [], call.get("s0"), call.get("z0")
    for t in range(70):
        o, s, z = hybrid_chunk(**part_of(call, t, t + 1, s, z))
        outputs.append(o)
    assert_near((torch.cat(outputs, 1), s, z), hybrid_chunk(**call))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 30, 100])
def test_without_features_it_is_windowed_attention(form, length):
    call = make_call(length=length, window=12, features=0, sinks=0, logits=0, mix=False, padding="left")
    o, s, z = FORMS[form](**call)
    # The attention operator counts the query itself as the newest key, and so does this window.
    q, k, v = (call[name].transpose(1, 2) for name in "qkv")
    mask = call["mask"][:, None, None]
    expected = attention(q, k, v, mask, scale=call["scale"], causal=True, window=12).transpose(1, 2)
    assert_near((o,), (expected,))
    assert (s.shape, z.shape) == ((2, 2, 0, 6), (2, 2, 0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 5, 12])
def test_inside_the_window_it_is_causal_softmax(form, length):
    call = make_call(length=length, window=12, sinks=0, logits=0, state=False)
    call["mask"] = (torch.arange(12 + length) >= 12).expand(2, -1)
    q, k, v = (call[name].transpose(1, 2) for name in "qkv")
    expected = attention(q, k[:, :, 12:], v[:, :, 12:], scale=call["scale"], causal=True).transpose(1, 2)
    assert_near(FORMS[form](**call)[:1], (expected,))


@pytest.mark.parametrize("form", FORMS)
def test_where_nothing_exists_the_output_is_zero(form):
    call = make_call(length=70, state=False, sinks=2, logits=0)
    call["mask"], call["sink_mask"] = torch.zeros_like(call["mask"]), torch.zeros_like(call["sink_mask"])
    for output in FORMS[form](**call):
        assert (output == 0).all()


@pytest.mark.parametrize("form", FORMS)
def test_masked_tokens_leave_no_trace(form):
    call = make_call(length=80, window=9)
    first = FORMS[form](**call)
    for name in ("k", "v"):
        call[name] = torch.where(call["mask"][:, :, None, None], call[name], 1e3)
    call["fk"] = torch.where(call["mask"][:, :80, None, None], call["fk"], 1e3)
    assert_near(FORMS[form](**call), first)


@pytest.mark.parametrize("form", FORMS)
def test_the_maximum_is_part_of_the_function(form):
    """Larger logits mean a smaller softmax part: with m = s, one key in the window weighs c, not c e^s."""
    ones = torch.ones(1, 2, 1, 1, dtype=torch.float64)
    keys, values = 50 * ones, torch.tensor([1.0, 0.0], dtype=torch.float64)[None, :, None, None]
    o, _, _ = FORMS[form](
        ones[:, 1:],
        keys,
        values,
        ones[..., 0, 0] > 0,
        3 * ones[:, 1:],
        ones[:, 1:],
        ones[0, 0, 0] / 2,
        window=1,
        scale=1.0,
    )
    torch.testing.assert_close(o.item(), 3 / 3.5)


def test_the_states_are_not_the_callers():
    for features in (0, 7):
        call = make_call(features=features)
        before = {name: value.clone() for name, value in call.items() if isinstance(value, torch.Tensor)}
        for output in hybrid_chunk(**call):
            output.fill_(7)
        for name, value in before.items():
            assert torch.equal(call[name], value)


def test_bfloat16_inputs_keep_float32_states():
    call = make_call(dtype=torch.bfloat16, length=70)
    expected = truth(
        **{n: x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for n, x in call.items()}
    )
    for form in FORMS.values():
        o, s, z = form(**call)
        assert (o.dtype, s.dtype, z.dtype) == (torch.bfloat16, torch.float32, torch.float32)
        torch.testing.assert_close(o.double(), expected[0], rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("parts", [{}, {"features": 0}, {"sinks": 0, "logits": 0}, {"state": False, "mix": False}])
def test_gradients_equal_finite_differences(parts):
    call = make_call(
        **{"batch": 1, "length": 4, "head_dim": 2, "value_dim": 2, "features": 2, "padding": "random"} | parts
    )
    names = [name for name, value in call.items() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    tensors = [call[name].requires_grad_() for name in names]

    def function(*values):
        return tuple(x for x in hybrid_chunk(**call | dict(zip(names, values, strict=True))) if x.numel())

    assert torch.autograd.gradcheck(function, tensors)


def test_the_backward_holds_across_pieces():
    call = make_call(length=150, window=9)
    names = ("q", "k", "v", "fq", "fk", "mix", "sink_k", "sink_v", "sink_logits", "s0", "z0")
    tensors = [call[name].requires_grad_() for name in names]
    found, dense = (
        torch.autograd.grad(sum((x * x).sum() for x in form(**call)), tensors)
        for form in (hybrid_chunk, FORMS["reference"])
    )
    assert_near(found, dense)


def test_a_delay_line_of_the_wrong_length_is_refused():
    call = make_call(length=5, window=3)
    call["k"] = call["k"][:, 1:]
    with pytest.raises(OperatorError, match=r"k holds 7 keys, not window \+ T = 3 \+ 5"):
        hybrid_chunk(**call)


@pytest.mark.parametrize(
    ("absent", "message"), [("fk", "give both fq and fk"), ("sink_mask", "give all of sink_k, sink_v and sink_mask")]
)
def test_half_given_parts_are_refused(absent, message):
    call = make_call()
    del call[absent]
    with pytest.raises(OperatorError, match=message):
        hybrid_chunk(**call)
