"""`linearize::hybrid_step`: token by token it is `hybrid_chunk`, its states written once a window."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from linearize.kernels.cpu.steps import within
from linearize.ops import OPERATORS, OperatorError, attention, hybrid_chunk, hybrid_step
from tests.ops.helpers import assert_near

FORMS = {name: getattr(OPERATORS["hybrid_step"], name) for name in ("recurrence", "reference", "overload")}


class Sequence:
    """Rows of tokens, the pools that decode them, and what `hybrid_chunk` makes of them at once."""

    def __init__(self, seed=0, dtype=torch.float64, batch=2, length=30, window=4, kv_heads=2, group=2, head_dim=8,
                 value_dim=5, features=6, sinks=0, logits=0, mix=True, pool=3):  # fmt: skip
        generator = torch.Generator().manual_seed(seed)
        heads = kv_heads * group

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=dtype)

        self.window, self.sinks, self.length, self.scale = window, sinks, length, head_dim**-0.5
        self.q, self.k = normal(batch, length, heads, head_dim), normal(batch, length, kv_heads, head_dim)
        self.v = normal(batch, length, kv_heads, value_dim)
        self.fq = normal(batch, length, heads, features).exp() if features else None
        self.fk = normal(batch, length, kv_heads, features).exp() if features else None
        self.mix = normal(heads).exp() if mix else None
        self.logits = normal(heads, logits) if logits else None
        self.index = torch.tensor([2, 0, 1])[:batch] if pool else None
        rows, states = pool or batch, accumulate(dtype)
        stale = {"dtype": dtype}  # rings hold the leavings of other sequences; states start at zero
        self.pools = {
            "ring_k": torch.full((rows, 2 * window, kv_heads, head_dim), 9.0, **stale),
            "ring_v": torch.full((rows, 2 * window, kv_heads, value_dim), 9.0, **stale),
        }
        if features:
            self.pools |= {
                "ring_f": torch.full((rows, 2 * window, kv_heads, features), 9.0, **stale),
                "s": torch.zeros(rows, kv_heads, features, value_dim, dtype=states),
                "z": torch.zeros(rows, kv_heads, features, dtype=states),
            }
        if sinks:
            self.pools |= {
                "sink_k": torch.full((rows, sinks, kv_heads, head_dim), 9.0, **stale),
                "sink_v": torch.full((rows, sinks, kv_heads, value_dim), 9.0, **stale),
            }

    def step(self, form, t):
        now = slice(t, t + 1)
        features = (None, None) if self.fq is None or self.fk is None else (self.fq[:, now], self.fk[:, now])
        pos = torch.full((self.q.shape[0],), t)
        return form(
            self.q[:, now], self.k[:, now], self.v[:, now], *features, pos, mix=self.mix, sink_logits=self.logits,
            index=self.index, window=self.window, scale=self.scale, **self.pools,
        )  # fmt: skip

    def at_once(self):
        """`hybrid_chunk`: w empty places before the tokens, sinks as keys of their own."""
        batch, m, w = self.q.shape[0], self.sinks, self.window
        line_k, line_v = (torch.nn.functional.pad(x, (0, 0, 0, 0, w, 0)) for x in (self.k, self.v))
        rank = torch.arange(-w, self.length)
        mask = (rank >= m).expand(batch, -1)
        call = {"mix": self.mix, "sink_logits": self.logits, "window": w, "scale": self.scale}
        if self.fq is not None and self.fk is not None:
            leaving = torch.nn.functional.pad(self.fk, (0, 0, 0, 0, w, 0))[:, : self.length]
            call |= {"fq": self.fq, "fk": leaving}
        if m:
            seen = (torch.arange(self.length)[:, None] >= torch.arange(m)).expand(batch, -1, -1)
            call |= {"sink_k": self.k[:, :m], "sink_v": self.v[:, :m], "sink_mask": seen}
        return hybrid_chunk(self.q, line_k, line_v, mask, **call)


def accumulate(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


@st.composite
def sequences(draw):
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 2), (1, 4)]))
    sinks = draw(st.sampled_from([0, 2]))
    return Sequence(
        seed=draw(st.integers(0, 2**20)), dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        batch=draw(st.integers(1, 3)), window=draw(st.integers(1, 6)), length=draw(st.integers(max(1, sinks), 25)),
        kv_heads=kv_heads, group=group, features=draw(st.sampled_from([0, 6])), sinks=sinks,
        logits=draw(st.sampled_from([0, 2])), mix=draw(st.booleans()), pool=draw(st.sampled_from([0, 3])),
    )  # fmt: skip


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(sequences(), st.sampled_from([*FORMS]))
def test_steps_from_empty_pools_are_hybrid_chunk(x, form):
    found = torch.cat([x.step(FORMS[form], t) for t in range(x.length)], dim=1)
    assert_near(found, x.at_once()[0])


@pytest.mark.parametrize("form", FORMS)
def test_the_state_is_written_once_a_window_and_is_that_of_the_folded_tokens(form):
    x = Sequence(length=23, window=4, features=6, pool=0)
    written = []
    for t in range(23):
        before = x.pools["s"].clone()
        x.step(FORMS[form], t)
        if not torch.equal(before, x.pools["s"]):
            written.append(t)
    assert written == [8, 12, 16, 20]
    folded = slice(0, 16)
    expected = torch.einsum("btgf,btgv->bgfv", x.fk[:, folded], x.v[:, folded])
    assert_near((x.pools["s"], x.pools["z"]), (expected, x.fk[:, folded].sum(1)))


@pytest.mark.parametrize("form", FORMS)
def test_rows_at_different_places_do_not_meet(form):
    x, y = Sequence(length=20), Sequence(length=20)
    for t in range(11):
        x.step(FORMS[form], t)
        y.step(FORMS[form], t)
    alone = x.step(FORMS[form], 11)
    pos = torch.tensor([11, 2])
    args = [z[:, 11:12].clone() for z in (y.q, y.k, y.v, y.fq, y.fk)]
    both = FORMS[form](*args, pos, mix=y.mix, index=y.index, window=4, scale=y.scale, **y.pools)
    assert_near(both[:1], alone[:1])


@pytest.mark.parametrize("form", FORMS)
def test_inside_the_window_it_is_softmax_attention(form):
    x = Sequence(length=4, window=4, mix=False)
    found = torch.cat([x.step(FORMS[form], t) for t in range(4)], dim=1)
    q, k, v = (z.transpose(1, 2) for z in (x.q, x.k, x.v))
    assert_near(found, attention(q, k, v, scale=x.scale, causal=True).transpose(1, 2))


@pytest.mark.parametrize("index", [[0, 3], [0, -1]])
def test_rows_and_ranks_outside_the_pools_never_reach_c(index):
    with pytest.raises(OperatorError, match="outside a pool of 3"):
        within(torch.tensor(index), 3)


def test_calls_that_do_not_fit_are_refused():
    x = Sequence()
    q, k, v, pos = x.q[:, :1], x.k[:, :1], x.v[:, :1], torch.zeros(2, dtype=torch.int64)
    rings = x.pools["ring_k"], x.pools["ring_v"]
    with pytest.raises(OperatorError, match="the ring holds 8 tokens, not 2 x 5"):
        hybrid_step(q, k, v, None, None, pos, *rings, index=x.index, window=5, scale=1.0)
    with pytest.raises(OperatorError, match="give all of fq, fk, ring_f, s and z, or none"):
        hybrid_step(q, k, v, x.fq[:, :1], None, pos, *rings, index=x.index, window=4, scale=1.0)
