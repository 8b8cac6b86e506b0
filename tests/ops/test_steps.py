"""The step operators: each is its chunk operator's one token, in place, for the rows of a pool that an index names."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linearize.kernels import choose, registry
from linearize.kernels.cpu import native
from linearize.ops import OPERATORS, OperatorError, delta_step, gla_step, gla_vec_step
from tests.ops.helpers import GATES, assert_near, draw_tokens

CHUNKS = {"gla_step": "gla_chunk", "gla_vec_step": "gla_vec_chunk", "delta_step": "delta_chunk"}
FORMS = ("recurrence", "reference", "overload")


@st.composite
def calls(draw):
    """(operator, tokens as the chunk operator takes them, keywords, state)."""
    name = draw(st.sampled_from([*CHUNKS]))
    kind = draw(st.sampled_from(GATES if name == "gla_vec_step" else ["none", *GATES]))
    x = draw_tokens(draw, longest=1, dims=((8, 8), (9, 16), (33, 5), (100, 64)), shared=kind == "none")
    beta = (x.uniform(*x.by_state),) if name == "delta_step" else ()
    tokens = (x.q, x.k, x.v, *beta, x.gates(kind, by_channel=name == "gla_vec_step"))
    keywords = {"scale": 0.3} | ({"l2norm": draw(st.booleans())} if beta else {})
    return name, tokens, keywords, x.state()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.sampled_from(FORMS))
def test_a_step_is_the_chunk_operator_at_one_token(call, form):
    name, tokens, keywords, state = call
    expected = OPERATORS[CHUNKS[name]].recurrence(*tokens, state, **keywords)
    s = state.clone()
    o = getattr(OPERATORS[name], form)(*tokens, s, **keywords)
    assert_near((o, s), expected)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(calls(), st.sampled_from(FORMS))
def test_rows_find_their_states_in_the_pool_and_leave_the_others(call, form):
    name, tokens, keywords, state = call
    index = torch.tensor([3, 1])[: state.shape[0]]
    pool = torch.full((5, *state.shape[1:]), 7.0, dtype=state.dtype).index_copy(0, index, state)
    s = state.clone()
    expected = getattr(OPERATORS[name], form)(*tokens, s, **keywords)
    o = getattr(OPERATORS[name], form)(*tokens, pool, index, **keywords)
    assert_near((o, pool[index]), (expected, s))
    others = [row for row in range(5) if row not in index.tolist()]
    assert bool((pool[others] == 7.0).all())


@pytest.mark.parametrize("name", CHUNKS)
def test_forty_steps_are_one_chunk_call(name):
    torch.manual_seed(0)
    q, k, v = torch.randn(2, 40, 4, 16), torch.randn(2, 40, 2, 16), torch.randn(2, 40, 2, 8)
    g = -torch.rand(2, 40, 2, 16) if name == "gla_vec_step" else -torch.rand(2, 40, 2)
    tokens = (q, k, v, torch.rand(2, 40, 2), g) if name == "delta_step" else (q, k, v, g)
    keywords = {"l2norm": True} if name == "delta_step" else {}
    s, outputs = torch.zeros(2, 2, 16, 8), []
    for t in range(40):
        outputs.append(OPERATORS[name].overload(*(x[:, t : t + 1] for x in tokens), s, **keywords))
    assert_near((torch.cat(outputs, 1), s), OPERATORS[CHUNKS[name]].overload(*tokens, None, **keywords))


@pytest.mark.parametrize("name", CHUNKS)
def test_without_a_compiler_the_torch_form_runs(monkeypatch, name):
    monkeypatch.setattr(registry, "_KERNELS", {})
    torch.manual_seed(0)
    q = torch.randn(2, 1, 2, 4)
    g = torch.full((2, 1, 2, 4), -0.5) if name == "gla_vec_step" else torch.full((2, 1, 2), -0.5)
    tokens = (q, q, q, torch.rand(2, 1, 2), g) if name == "delta_step" else (q, q, q, g)
    s = torch.randn(2, 2, 4, 4)
    truth = s.clone()
    expected = OPERATORS[name].recurrence(*tokens, truth)
    monkeypatch.setitem(registry._KERNELS, (name, "cpu"), ())
    assert_near((OPERATORS[name].overload(*tokens, s), s), (expected, truth))


def test_bfloat16_tokens_update_a_float32_state():
    q, s = torch.randn(1, 1, 2, 8).bfloat16(), torch.zeros(1, 2, 8, 8)
    o = gla_step(q, q, q, None, s)
    assert o.dtype == torch.bfloat16
    torch.testing.assert_close(s, q[:, 0, :, :, None].float() * q[:, 0, :, None].float())


def test_a_state_that_c_cannot_write_goes_to_the_torch_form():
    q, s = torch.randn(2, 1, 2, 4), torch.randn(2, 4, 4, 2).transpose(1, 3)
    kernel, declined = choose("gla_step", "cpu", (q, q, q, None, s), {})
    assert kernel is None
    assert declined == [("cpu.gla_step_c", native.missing("steps") or "a state is not contiguous")]
    before, whole = s.clone(), s.contiguous()
    assert_near((gla_step(q, q, q, None, s), s), (gla_step(q, q, q, None, whole), whole))
    assert not torch.equal(before, s)


def test_calls_that_do_not_fit_are_refused():
    q, s, g = torch.randn(2, 1, 2, 4), torch.zeros(2, 2, 4, 4), torch.zeros(2, 1, 2, 4)
    with pytest.raises(OperatorError, match="gla_step: one token a row, not 3"):
        gla_step(torch.randn(2, 3, 2, 4), q, q, None, s)
    with pytest.raises(OperatorError, match="gla_vec_step: states for 1 rows, a batch of 2"):
        gla_vec_step(q, q, q, g, s, torch.tensor([0]))
    with pytest.raises(OperatorError, match=r"delta_step: states must be torch.float32"):
        delta_step(q, q, q, g[..., 0], None, s.double())
