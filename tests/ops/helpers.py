"""What the tests of operators share: how near is near, gates of every kind, random tokens, laws of recurrences."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

import linearize.kernels  # noqa: F401  (the operators then run their CPU kernels)
from linearize.ops import OPERATORS

TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-12}
GATES = ("gentle", "steep", "mixed", "reset")


def assert_near(found, expected):
    """Largest difference of each output relative to its largest value."""
    found, expected = ((x,) if isinstance(x, Tensor) else x for x in (found, expected))
    for a, b in zip(found, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        torch.testing.assert_close(a, b, rtol=0, atol=TOLERANCE[b.dtype] * scale)


def make_gates(kind, shape, generator, dtype):
    """Log gates: None, gentle, down to -80 everywhere, -80 at a few tokens among gentle ones, or full resets."""
    gentle = -0.1 * torch.rand(shape, generator=generator, dtype=dtype)
    rare = torch.rand(shape, generator=generator) > 0.9
    return {
        "none": None,
        "gentle": gentle,
        "steep": 800 * gentle,
        "mixed": torch.where(rare, -80.0, gentle).to(dtype),
        "reset": torch.where(rare, float("-inf"), gentle).to(dtype),
    }[kind]


@dataclass(frozen=True)
class Tokens:
    """Drawn q [B,T,H,K], k [B,T,G,K], v [B,T,G,V], and how many heads have gates and states."""

    q: Tensor
    k: Tensor
    v: Tensor
    state_heads: int
    generator: torch.Generator

    @property
    def by_state(self) -> tuple[int, int, int]:
        return (*self.q.shape[:2], self.state_heads)

    def gates(self, kind: str, by_channel: bool = False) -> Tensor | None:
        shape = (*self.by_state, self.q.shape[3]) if by_channel else self.by_state
        return make_gates(kind, shape, self.generator, self.q.dtype)

    def uniform(self, *shape: int) -> Tensor:
        return torch.rand(*shape, generator=self.generator, dtype=self.q.dtype)

    def state(self) -> Tensor:
        shape = (self.q.shape[0], self.state_heads, self.q.shape[3], self.v.shape[3])
        return torch.randn(shape, generator=self.generator, dtype=self.q.dtype)


def draw_tokens(
    draw, longest=150, dims=((8, 8), (9, 16), (33, 5)), heads=((1, 1), (2, 1), (2, 2), (1, 4)), shared=False
):
    """T from 1 to `longest`, GQA and MQA, states by kv head (where `shared`, always) or by query head, two dtypes."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    kv_heads, group = draw(st.sampled_from(heads))
    batch, length = draw(st.integers(1, 2)), draw(st.one_of(st.just(1), st.integers(1, longest)))
    key_dim, value_dim = draw(st.sampled_from(dims))

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    q, k = normal(batch, length, kv_heads * group, key_dim), normal(batch, length, kv_heads, key_dim)
    state_heads = kv_heads if shared else draw(st.sampled_from([kv_heads, kv_heads * group]))
    return Tokens(q, k, normal(batch, length, kv_heads, value_dim), state_heads, generator)


# ---- laws of recurrences: an operator of (*tokens, s0) with outputs (o, s) -------------------------------------------


def assert_every_form_is_the_recurrence(name, args, keywords):
    operator = OPERATORS[name]
    expected = operator.recurrence(*args, **keywords)
    for form in (operator.reference, operator.streamed, operator.overload):
        assert_near(form(*args, **keywords), expected)


def assert_pieces_equal_one_call(name, args, keywords, sizes):
    """The tokens fed in pieces of these sizes, the state carried."""
    operator, (*tokens, state), outputs, start = OPERATORS[name].overload, args, [], 0
    whole = operator(*tokens, state, **keywords)
    for size in sizes:
        part = slice(start, start + size)
        o, state = operator(*(None if x is None else x[:, part] for x in tokens), state, **keywords)
        outputs.append(o)
        start += size
    assert_near((torch.cat(outputs, 1), state), whole)


def assert_rows_do_not_meet(kernel, tokens, **keywords):
    order = torch.tensor([2, 0, 1])
    moved = kernel(*(x[order] for x in tokens), **keywords)
    for a, b in zip(moved, kernel(*tokens, **keywords), strict=True):
        torch.testing.assert_close(a, b[order])


def cut(length, fraction):
    """Two pieces of a length, one of which may be all of it."""
    first = min(length - 1, int(fraction * length))
    return [size for size in (first, length - first) if size]
