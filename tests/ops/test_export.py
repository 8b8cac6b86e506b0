"""All operators: one opaque node with dynamic sizes under torch.export, standard operators after decomposition."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.utils._pytree import tree_leaves

import linearize.kernels  # noqa: F401  (the operators then run their CPU kernels)
from linearize.ops import (
    OPERATORS,
    attention,
    decompositions,
    delta_chunk,
    gla_chunk,
    gla_vec_chunk,
    hybrid_chunk,
    slots_chunk,
)

WINDOW = 6


class Attention(nn.Module):
    """x [B,T,12] -> [B,T,H,d] through every operator's own call, so that one test serves all."""

    def forward(self, x):
        q, k, v = _heads(x)
        bias = torch.zeros(x.shape[1], x.shape[1])
        return attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            bias,
            torch.ones(4),
            scale=0.5,
            causal=True,
            window=5,
        )


class Gla(nn.Module):
    def forward(self, x):
        q, k, v = _heads(x)
        return gla_chunk(q, k, v, -nn.functional.softplus(-q[..., 0]), torch.ones(x.shape[0], 4, 3, 3), scale=0.5)


class PlainGla(nn.Module):
    def forward(self, x):
        return gla_chunk(*_heads(x))


class GlaVec(nn.Module):
    def forward(self, x):
        q, k, v = _heads(x)
        return gla_vec_chunk(q, k, v, -nn.functional.softplus(-q), torch.ones(x.shape[0], 4, 3, 3), scale=0.5)


class Delta(nn.Module):
    def forward(self, x):
        q, k, v = _heads(x)
        beta, gates = q[..., 0].sigmoid(), -nn.functional.softplus(-q[..., 1])
        return delta_chunk(q, k, v, beta, gates, torch.ones(x.shape[0], 4, 3, 3), scale=0.5, l2norm=True)


class PlainDelta(nn.Module):
    def forward(self, x):
        q, k, v = _heads(x)
        return delta_chunk(q, k, v, q[..., ::2, 0].sigmoid(), l2norm=True)


class Hybrid(nn.Module):
    def forward(self, x):
        q, k, v = _heads(x)
        mask = torch.ones(x.shape[0], x.shape[1] + WINDOW, dtype=torch.bool)
        line_k, line_v = (nn.functional.pad(t, (0, 0, 0, 0, WINDOW, 0)) for t in (k, v))
        sinks = (line_k[:, :2], line_v[:, :2], mask[:, : x.shape[1], None].expand(-1, -1, 2), torch.ones(4, 1))
        features = q.exp(), line_k[:, : x.shape[1]].exp()
        return hybrid_chunk(q, line_k, line_v, mask, *features, torch.ones(4), *sinks, window=WINDOW, scale=0.5)


class Window(nn.Module):
    def forward(self, x):
        q, k, v = _heads(x)
        mask = torch.ones(x.shape[0], x.shape[1] + WINDOW, dtype=torch.bool)
        line_k, line_v = (nn.functional.pad(t, (0, 0, 0, 0, WINDOW, 0)) for t in (k, v))
        return hybrid_chunk(q, line_k, line_v, mask, window=WINDOW, scale=0.5)


class Slots(nn.Module):
    def forward(self, x):
        q, k, v = _heads(x)
        rows = x.new_zeros(x.shape[0])
        mask, before = torch.ones(x.shape[:2], dtype=torch.bool), rows.long()
        ring, slots = rows[:, None, None, None].expand(-1, 8, 2, 3), rows[:, None, None, None].expand(-1, 2, 5, 3)
        state = (ring, ring, slots, slots, slots[..., 0])
        return slots_chunk(q, k, v, mask, before, *state, window=4, scale=0.5, sinks=1, rounds=2)


MODULES = {
    "attention": Attention,
    "gla": Gla,
    "plain_gla": PlainGla,
    "gla_vec": GlaVec,
    "delta": Delta,
    "plain_delta": PlainDelta,
    "hybrid": Hybrid,
    "window": Window,
    "slots": Slots,
}


def _heads(x):
    """q [B,T,4,3], k and v [B,T,2,3]."""
    q = x.unflatten(2, (4, 3))
    return q, q[:, :, :2] + 1, q[:, :, 2:] - 1


def export(name):
    with torch.no_grad():
        dims = {"x": {0: Dim("B", min=1, max=64), 1: Dim("T", min=1, max=4096)}}
        return torch.export.export(MODULES[name](), (torch.randn(2, 9, 12),), dynamic_shapes=dims)


def ours_in(program):
    return [node.target for node in program.graph.nodes if str(node.target).startswith("linearize.")]


@pytest.mark.parametrize("name", MODULES)
def test_export_keeps_one_node_that_runs_at_other_sizes(name):
    program = export(name)
    assert len(ours_in(program)) == 1
    for batch, length in ((1, 1), (2, 9), (3, 70)):
        x = torch.randn(batch, length, 12)
        torch.testing.assert_close(program.module()(x), MODULES[name]()(x))


@pytest.mark.parametrize("name", MODULES)
def test_the_decomposition_equals_the_operator_under_export(name):
    program = export(name).run_decompositions(torch.export.default_decompositions() | decompositions())
    assert not ours_in(program)
    targets = {str(node.target) for node in program.graph.nodes if node.op == "call_function"} - {"scan"}
    assert all(target.startswith(("aten.", "<built-in function", "<function sym_")) for target in targets), targets
    for batch, length in ((1, 1), (2, 9), (3, 70)):
        x = torch.randn(batch, length, 12)
        for found, expected in zip(tree_leaves(program.module()(x)), tree_leaves(MODULES[name]()(x)), strict=True):
            largest = expected.abs().max().item() if expected.numel() else 0.0
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 * max(1.0, largest))


@pytest.mark.parametrize("name", MODULES)
def test_meta_tensors_give_shapes(name):
    x = torch.randn(2, 9, 12)
    real = MODULES[name]()(x)
    with torch.device("meta"):
        meta = MODULES[name]()(x.to("meta"))
    for a, b in zip(tree_leaves(meta), tree_leaves(real), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


def samples():
    """(operator, args, kwargs) with every optional part, and with none."""
    q, k = torch.randn(2, 5, 4, 3), torch.randn(2, 5, 2, 3)
    g, s0 = -torch.rand(2, 5, 4), torch.randn(2, 4, 3, 3)
    line, mask = torch.randn(2, 5 + WINDOW, 2, 3), torch.rand(2, 5 + WINDOW) > 0.3
    sinks = torch.randn(2, 2, 2, 3), torch.randn(2, 2, 2, 3), torch.rand(2, 5, 2) > 0.3, torch.randn(4, 1)
    features = torch.rand(2, 5, 4, 7), torch.rand(2, 5, 2, 7), torch.rand(4)
    state = torch.randn(2, 2, 7, 3), torch.rand(2, 2, 7)
    rows = q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2).clone()
    hybrid = {"window": WINDOW, "scale": 0.5}
    ring, slots = torch.zeros(2, 4, 2, 3), torch.zeros(2, 2, 4, 3)
    started = torch.rand(2, 5) > 0.3, torch.zeros(2, dtype=torch.int64), ring, ring.clone(), slots, slots.clone()
    softcapped = {"scale": 0.5, "softcap": 2.0, "window": 3}
    return {
        "attention": (attention, rows, {"scale": 0.5, "causal": True}),
        "attention_full": (attention, (*rows, torch.randn(5, 5), torch.randn(4)), softcapped),
        "gla": (gla_chunk, (q, k, k.clone()), {}),
        "gla_full": (gla_chunk, (q, k, k.clone(), g, s0), {"scale": 0.5}),
        "gla_vec": (gla_vec_chunk, (q, k, k.clone(), -torch.rand(2, 5, 2, 3)), {}),
        "gla_vec_full": (gla_vec_chunk, (q, k, k.clone(), -torch.rand(2, 5, 4, 3), s0), {"scale": 0.5}),
        "delta": (delta_chunk, (q, k, k.clone(), torch.rand(2, 5, 2)), {}),
        "delta_full": (delta_chunk, (q, k, k.clone(), torch.rand(2, 5, 4), g.clone(), s0.clone()), {"l2norm": True}),
        "hybrid": (hybrid_chunk, (q, line, line.clone(), mask), hybrid),
        "hybrid_full": (hybrid_chunk, (q, line, line.clone(), mask, *features, *sinks, *state), hybrid),
        "slots": (slots_chunk, (q, k, k.clone(), *started, slots[..., 0].clone()), {"window": 2, "scale": 0.5}),
    }


@pytest.mark.parametrize("name", samples())
def test_the_registration_passes_opcheck(name):
    operator, args, kwargs = samples()[name]
    if name.endswith("_full"):  # opcheck then traces the backward, too
        args = [x.requires_grad_() if x.is_floating_point() else x for x in args]
    torch.library.opcheck(operator, args, kwargs)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_can_be_decomposed(name):
    assert decompositions()[OPERATORS[name].overload] is OPERATORS[name].reference
