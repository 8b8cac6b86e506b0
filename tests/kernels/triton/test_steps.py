"""The Triton step kernels in the honest interpreter: values, pools, and which memory they leave alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linearize.kernels.triton import delta_step, hybrid_step, steps
from linearize.ops.delta import delta_recurrence
from linearize.ops.gla import gla_chunk_recurrence
from linearize.ops.gla_vec import gla_vec_recurrence
from linearize.ops.hybrid_step import hybrid_step_recurrence
from tests.kernels.triton.checking import (
    BOUND,
    assert_equals_truth,
    assert_errs_at_most_twice,
    doubled,
    error,
    interpreted,
)
from tests.ops.helpers import GATES, draw_tokens
from tests.ops.test_hybrid_step import Sequence, sequences

SLOW = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}


@dataclass(frozen=True)
class Family:
    """A step, its one-token case with a new state, and the token loop that both equal."""

    step: Callable
    one: Callable
    truth: Callable
    keywords: dict


FAMILIES = {
    "gla": Family(steps.gla_step, steps.gla_one, gla_chunk_recurrence, {"scale": 0.3}),
    "gla_vec": Family(steps.gla_vec_step, steps.gla_vec_one, gla_vec_recurrence, {"scale": 0.3}),
    "delta": Family(delta_step.delta_step, delta_step.delta_one, delta_recurrence, {"scale": 0.3, "l2norm": True}),
}


@st.composite
def calls(draw):
    """(family, tokens, states): one token of each row."""
    name = draw(st.sampled_from(list(FAMILIES)))
    kind = draw(st.sampled_from(GATES if name == "gla_vec" else ["none", *GATES]))
    x = draw_tokens(draw, longest=1, dims=((8, 8), (33, 5), (100, 64)), shared=kind == "none" and name == "gla")
    gates = x.gates(kind, by_channel=name == "gla_vec")
    more = (2 * x.uniform(*x.by_state), gates) if name == "delta" else (gates,)
    return FAMILIES[name], (x.q, x.k, x.v, *more), x.state()


@settings(max_examples=20, **SLOW)
@given(calls(), st.booleans())
def test_a_step_updates_the_rows_of_the_pool_that_the_index_names(call, pooled):
    family, tokens, state = call
    index = torch.tensor([3, 1])[: state.shape[0]] if pooled else None
    pool = state.clone() if index is None else torch.full((5, *state.shape[1:]), 7.0, dtype=state.dtype)
    if index is not None:
        pool[index] = state

    def run():
        s = pool.clone()
        return family.step(*tokens, s, index, **family.keywords), s

    o, s = interpreted(run, orders=(0,))
    expected = family.truth(*doubled((*tokens, state)), **family.keywords)
    assert_equals_truth((o, s if index is None else s[index]), expected, state.dtype)
    others = [] if index is None else [row for row in range(5) if row not in index.tolist()]
    assert bool((s[others] == 7.0).all())


@settings(max_examples=12, **SLOW)
@given(calls(), st.booleans())
def test_one_token_of_a_chunked_operator_makes_a_new_state(call, start):
    family, tokens, state = call
    s0 = state if start else None
    before = state.clone()
    found = interpreted(lambda: family.one(*tokens, s0, **family.keywords), orders=(0,))
    assert_equals_truth(found, family.truth(*doubled((*tokens, s0)), **family.keywords), state.dtype)
    assert torch.equal(state, before)


def drawn(family, dtype):
    """One token of three rows with 4 query heads over 2 states, and these states; a view for a pool."""
    generator = torch.Generator().manual_seed(2)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    q, k, v = (normal(3, 1, heads, dim).to(dtype) for heads, dim in ((4, 24), (2, 24), (2, 40)))
    g = -normal(3, 1, 2, 24).abs().float()
    more = {"gla": (g[..., 0],), "gla_vec": (g,), "delta": (normal(3, 1, 2).sigmoid().float(), g[..., 0])}
    return (q, k, v, *more[family]), normal(3, 2, 40, 24).float().mT


@pytest.mark.parametrize("name", FAMILIES)
def test_the_order_of_the_programs_does_not_show_in_states_and_a_pool_may_be_a_view(name):
    family, (tokens, pool) = FAMILIES[name], drawn(name, torch.float32)

    def run():
        s = pool.clone(memory_format=torch.preserve_format)
        assert not s.is_contiguous()
        return family.step(*tokens, s, None, **family.keywords), s

    found = interpreted(run)
    assert_equals_truth(found, family.truth(*doubled((*tokens, pool)), **family.keywords), torch.float32)


def eager_step(name, q, k, v, *more, state, scale):
    """A step as PyTorch computes it on bfloat16 tensors, the state kept in float32; (o, state) after it."""
    g = more[-1] if name == "gla_vec" else more[-1][..., None]
    if name == "delta":
        q, k = (x / x.float().norm(dim=-1, keepdim=True).to(x.dtype) for x in (q, k))
    state, key, value = state * g[:, 0, :, :, None].exp(), k[:, 0, :, None], v[:, 0, :, None]
    if name == "delta":
        value = more[0][:, 0, :, None, None].bfloat16() * (value - key @ state.bfloat16())
    state = state + key.mT @ value
    read = q[:, 0].unflatten(1, (2, 2)) @ state.bfloat16()
    return read.flatten(1, 2)[:, None] * scale, state


@pytest.mark.parametrize("name", FAMILIES)
def test_bfloat16_errs_at_most_twice_as_much_as_pytorch_does(name):
    family, (tokens, pool) = FAMILIES[name], drawn(name, torch.bfloat16)

    def run():
        s = pool.contiguous().clone()
        return family.step(*tokens, s, None, **family.keywords), s

    found = interpreted(run, orders=(0,))
    expected = family.truth(*doubled((*tokens, pool)), **family.keywords)
    assert_errs_at_most_twice(found, eager_step(name, *tokens, state=pool, scale=0.3), expected)


def stepped(form, sequence, ticks):
    """The outputs of some steps from copies of the pools, and the pools after them."""
    kept, outputs = sequence.pools, []
    sequence.pools = {name: pool.clone() for name, pool in kept.items()}
    for t in ticks:
        outputs.append(form(sequence, t))
    after, sequence.pools = sequence.pools, kept
    return [torch.cat(outputs, 1), *after.values()]


def by_kernel(sequence, t):
    return sequence.step(hybrid_step.hybrid_step, t)


@settings(max_examples=6, **SLOW)
@given(sequences())
def test_steps_leave_outputs_and_pools_as_the_truth_does(sequence):
    ticks = range(min(sequence.length, 14))
    found = interpreted(lambda: stepped(by_kernel, sequence, ticks), orders=(0,))
    expected = stepped(lambda x, t: x.step(hybrid_step_recurrence, t), sequence, ticks)
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < BOUND[a.dtype]


def test_the_order_of_the_programs_does_not_show():
    sequence = Sequence(window=3, length=10, batch=1, features=20, sinks=2, logits=1, head_dim=16, value_dim=20)
    found = interpreted(lambda: stepped(by_kernel, sequence, range(10)))
    torch.testing.assert_close(found[0], sequence.at_once()[0])


def test_the_state_is_written_once_a_window():
    sequence = Sequence(window=4, length=17, features=6, batch=1, pool=0)
    written = []

    def run():
        for t in range(17):
            before = sequence.pools["s"].clone()
            sequence.step(hybrid_step.hybrid_step, t)
            written.append(not torch.equal(before, sequence.pools["s"]))
        return ()

    interpreted(run, orders=(0,))
    assert [t for t, wrote in enumerate(written) if wrote] == [8, 12, 16]


def eager_hybrid(x):
    """All tokens at once, as PyTorch computes the formula on tensors of half precision."""
    q, k, v, fq, fk = (
        y.repeat_interleave(x.q.shape[2] // y.shape[2], 2).transpose(1, 2) for y in (x.q, x.k, x.v, x.fq, x.fk)
    )
    i, j = torch.arange(x.length)[:, None], torch.arange(x.length)
    scores = (q @ k.mT * x.scale).masked_fill((j > i) | (j <= i - x.window), float("-inf"))
    near = (scores - scores.amax(-1, keepdim=True)).exp() * x.mix.to(q.dtype)[:, None, None]
    weights = near + (fq @ fk.mT).masked_fill(j > i - x.window, 0.0)
    return (weights @ v / weights.sum(-1, keepdim=True)).transpose(1, 2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_hybrid_steps_err_at_most_twice_as_much_as_pytorch_does(dtype):
    exact = {"window": 4, "length": 14, "batch": 1, "pool": 0}
    narrow, wide = Sequence(**exact), Sequence(**exact)
    for name in ("q", "k", "v", "fq", "fk"):
        setattr(narrow, name, getattr(narrow, name).to(dtype))
        setattr(wide, name, getattr(narrow, name).double())
    for name in ("ring_k", "ring_v", "ring_f"):
        narrow.pools[name] = narrow.pools[name].to(dtype)
    for name in ("s", "z"):
        narrow.pools[name] = narrow.pools[name].float()
    narrow.mix = narrow.mix.float()
    found = interpreted(lambda: stepped(by_kernel, narrow, range(14)), orders=(0,))
    assert_errs_at_most_twice(found[:1], [eager_hybrid(narrow)], [wide.at_once()[0]])
