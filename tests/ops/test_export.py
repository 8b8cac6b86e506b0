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
    delta_step,
    evict_chunk,
    gla_chunk,
    gla_step,
    gla_vec_chunk,
    gla_vec_step,
    grouped_mm,
    hybrid_chunk,
    hybrid_ring,
    hybrid_step,
    mla_decode,
    short_conv,
    slots_block,
    slots_chunk,
    slots_merge,
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


class Ring(nn.Module):
    """Window, sinks and Hedgehog features."""

    def forward(self, x):
        q, k, v = _heads(x)
        rows = x.new_zeros(x.shape[0])
        mask, positions = torch.ones(x.shape[:2], dtype=torch.bool), torch.arange(x.shape[1]).expand(x.shape[:2])
        ring, sinks = (rows[:, None, None, None].expand(-1, size, 2, 3).clone() for size in (WINDOW, 2))
        state = (ring, ring, ring[..., 0, 0] > 0, sinks, sinks)
        maps = torch.ones(4, 3, 2), torch.eye(3)[:, :2].expand(2, -1, -1), torch.zeros(4)
        return hybrid_ring(q, k, v, mask, positions, *state, *maps, window=WINDOW, scale=0.5)


class ShortConv(nn.Module):
    def forward(self, x):
        q, _, _ = _heads(x)
        return short_conv(q, torch.ones(x.shape[0], 2, 4, 3), torch.arange(36.0).reshape(4, 3, 3))


class Grouped(nn.Module):
    def forward(self, x):
        rows, matrices = x.flatten(0, 1), torch.arange(96.0).reshape(2, 4, 12)
        ends = (torch.ones_like(x[:, 0, 0]).sum() * torch.arange(2)).long()  # none of the first, B of the second
        return grouped_mm(rows, matrices, ends, transposed=True)


class Slots(nn.Module):
    def forward(self, x):
        q, k, v = _heads(x)
        rows = x.new_zeros(x.shape[0])
        mask, before = torch.ones(x.shape[:2], dtype=torch.bool), rows.long()
        ring, slots = rows[:, None, None, None].expand(-1, 8, 2, 3), rows[:, None, None, None].expand(-1, 2, 5, 3)
        state = (ring, ring, slots, slots, slots[..., 0])
        return slots_chunk(q, k, v, mask, before, *state, window=4, scale=0.5, sinks=1, rounds=2)


class Evict(nn.Module):
    """By what the queries gave, or with `filters` by what the keys say."""

    filters: torch.Tensor | None = None

    def forward(self, x):
        q, k, v = _heads(x)
        rows = x.new_zeros(x.shape[0])
        mask, before = torch.ones(x.shape[:2], dtype=torch.bool), rows.long()
        ring, kept = rows[:, None, None, None].expand(-1, 8, 2, 3), rows[:, None, None, None].expand(-1, 2, 5, 3)
        mass = rows[:, None, None].expand(-1, 2, 13) if self.filters is None else None
        state, options = (ring, ring, kept, kept, mass, self.filters), {"sinks": 1, "memory": 0.5}
        return evict_chunk(q, k, v, mask, before, *state, window=4, scale=0.5, **options)


class Filtered(Evict):
    filters = torch.ones(2, 3)


class Mla(nn.Module):
    """Every token is the cache of a query that is the row's sum."""

    def forward(self, x):
        return mla_decode(x.sum(1).unflatten(1, (3, 4))[:, :, :3], x[..., :3], rank=2, scale=0.5)


class Block(nn.Module):
    """A block of one query after all the others."""

    def forward(self, x):
        q, k, v = _heads(x)
        line_k, line_v = (nn.functional.pad(t[:, -1:], (0, 0, 0, 0, 4, 0)) for t in (k, v))
        slots = [t.transpose(1, 2) for t in (k, v)]
        return slots_block(q[:, -1:], line_k, line_v, *slots, slots[0][..., 0].abs(), window=4, scale=0.5)


class Merge(nn.Module):
    def forward(self, x):
        q, k, v = _heads(x)
        slots = q[:, :1, :2].new_ones(x.shape[0], 2, 5, 3)
        metric, lam = torch.eye(3).expand(2, -1, -1), torch.ones(2)
        return slots_merge(slots, slots, slots[..., 0], k[:, :1], v[:, :1], metric, lam, sinks=1, rounds=2)


class Steps(nn.Module):
    """The last token through every step operator, on states that it makes; outputs and states."""

    def forward(self, x):
        q, k, v = (t[:, -1:] for t in _heads(x))
        states = [x.new_ones(x.shape[0], 2, 3, 3) for _ in range(4)]
        gates, features = -k.abs(), (q.exp(), k.exp())
        rings = [x.new_zeros(x.shape[0], 8, 2, 3) for _ in range(3)]
        pos, masses = torch.zeros(x.shape[0], dtype=torch.int64), states[0][..., 0].clone()
        outputs = [
            gla_step(q, k, v, gates[..., 0], states[0]),
            gla_vec_step(q, k, v, gates, states[1]),
            delta_step(q, k, v, k[..., 0].sigmoid(), gates[..., 0], states[2], l2norm=True),
            hybrid_step(q, k, v, *features, pos, *rings, states[3], masses, window=4, scale=0.5),
        ]
        return (*outputs, *states, *rings, masses)


MODULES = {
    "attention": Attention,
    "gla": Gla,
    "plain_gla": PlainGla,
    "gla_vec": GlaVec,
    "delta": Delta,
    "plain_delta": PlainDelta,
    "hybrid": Hybrid,
    "window": Window,
    "ring": Ring,
    "short_conv": ShortConv,
    "evict": Evict,
    "filtered": Filtered,
    "grouped": Grouped,
    "slots": Slots,
    "slots_block": Block,
    "slots_merge": Merge,
    "mla_decode": Mla,
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
    return [node.target for node in program.graph.nodes if "linearize." in str((node.target, node.args[:1]))]


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
            largest = expected.double().abs().max().item() if expected.numel() else 0.0
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
    merged = torch.randn(2, 2, 4, 3), torch.randn(2, 2, 4, 3), torch.rand(2, 2, 4) + 0.5
    ranks = torch.arange(5).expand(2, -1).contiguous()
    ring_state = line[:, :WINDOW].clone(), line[:, :WINDOW] + 1, mask[:, :WINDOW].clone()
    maps = torch.randn(4, 3, 2), torch.randn(2, 3, 2), torch.zeros(4), torch.randn(4, 1)
    ring_rest = (*(x.clone() for x in sinks[:2]), *maps, torch.rand(2, 2, 4, 3), torch.rand(2, 2, 4))
    block = line[:, : WINDOW + 5], line[:, : WINDOW + 5].clone(), *merged
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
        "ring": (hybrid_ring, (q, k, k.clone(), mask[:, :5], ranks, *ring_state), hybrid),
        "ring_full": (hybrid_ring, (q, k, k.clone(), mask[:, :5], ranks, *ring_state, *ring_rest), hybrid),
        "mla": (mla_decode, (q[:, 0], k[:, :, 0]), {"rank": 2, "scale": 0.5}),
        "mla_lens": (mla_decode, (q[:, 0], k[:, :, 0], torch.tensor([5, 2])), {"rank": 2, "scale": 0.5}),
        "block": (slots_block, (q, *block), {"window": WINDOW, "scale": 0.5}),
        "block_masked": (slots_block, (q, *block, mask), {"window": WINDOW, "scale": 0.5}),
        "merge": (slots_merge, (*merged, k, k.clone()), {}),
        "merge_sinks": (
            slots_merge,
            (*merged, k, k.clone(), torch.eye(3).expand(2, -1, -1), torch.ones(2)),
            {"sinks": 1},
        ),
        "grouped": (grouped_mm, (q[:, 0, 0], torch.randn(3, 3, 4), torch.tensor([1, 1, 2])), {}),
        "grouped_full": (grouped_mm, (q[0, 0], torch.randn(2, 5, 3), torch.tensor([0, 3])), {"transposed": True}),
        "evict": (evict_chunk, (q, k, k.clone(), *started, torch.zeros(2, 2, 8)), {"window": 2, "scale": 0.5}),
        "filtered": (evict_chunk, (q, k, k.clone(), *started, None, k[0, 0]), {"window": 2, "scale": 0.5}),
        "slots": (slots_chunk, (q, k, k.clone(), *started, slots[..., 0].clone()), {"window": 2, "scale": 0.5}),
    }


@pytest.mark.parametrize("name", samples())
def test_the_registration_passes_opcheck(name):
    operator, args, kwargs = samples()[name]
    if name.endswith("_full"):  # opcheck then traces the backward, too
        args = [x.requires_grad_() if x.is_floating_point() else x for x in args]
    torch.library.opcheck(operator, args, kwargs)


def step_samples():
    """(operator, args, kwargs) of the operators that write to an argument, with every optional part and with none."""
    q, k, s = torch.randn(2, 1, 4, 3), torch.randn(2, 1, 2, 3), torch.randn(3, 2, 3, 3)
    g, index = -torch.rand(2, 1, 2, 3), torch.tensor([2, 0])
    rings, pos = (torch.randn(3, 4, 2, 3), torch.randn(3, 4, 2, 3)), torch.tensor([9, 4])
    far = torch.rand(3, 4, 2, 7), torch.rand(3, 2, 7, 3), torch.rand(3, 2, 7)
    rest = torch.rand(4), torch.randn(3, 2, 2, 3), torch.randn(3, 2, 2, 3), torch.randn(4, 1), index
    hybrid, features = {"window": 2, "scale": 0.5}, (torch.rand(2, 1, 4, 7), torch.rand(2, 1, 2, 7))
    return {
        "gla": (gla_step, (q, k, k.clone(), None, s[:2]), {}),
        "gla_full": (gla_step, (q, k, k.clone(), g[..., 0], s, index), {"scale": 0.5}),
        "gla_vec": (gla_vec_step, (q, k, k.clone(), g, s, index), {}),
        "delta": (delta_step, (q, k, k.clone(), torch.rand(2, 1, 2), None, s[:2]), {}),
        "delta_full": (delta_step, (q, k, k.clone(), torch.rand(2, 1, 2), g[..., 0], s, index), {"l2norm": True}),
        "hybrid": (hybrid_step, (q, k, k.clone(), None, None, pos, rings[0][:2], rings[1][:2]), hybrid),
        "hybrid_full": (hybrid_step, (q, k, k.clone(), *features, pos, *rings, *far, *rest), hybrid),
    }


@pytest.mark.parametrize("name", step_samples())
def test_the_registration_of_steps_passes_opcheck(name):
    operator, args, kwargs = step_samples()[name]
    torch.library.opcheck(operator, args, kwargs)


@pytest.mark.parametrize("form", ["overload", "reference"])
def test_steps_export_with_what_they_write(monkeypatch, form):
    """torch decomposes no operator that writes to its arguments, so the references are exported as they are."""
    for name in ("gla_step", "gla_vec_step", "delta_step", "hybrid_step"):
        monkeypatch.setitem(globals(), name, getattr(OPERATORS[name], form))
    with torch.no_grad():
        dims = {"x": {0: Dim("B", min=1, max=64), 1: Dim("T", min=1, max=4096)}}
        program = torch.export.export(Steps(), (torch.randn(2, 9, 12),), dynamic_shapes=dims)
    assert len(ours_in(program)) == (4 if form == "overload" else 0)
    monkeypatch.undo()
    for batch, length in ((1, 1), (3, 70)):
        x = torch.randn(batch, length, 12)
        for found, expected in zip(program.module()(x), Steps()(x), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("module", [*MODULES.values(), Steps])
def test_compile_makes_one_graph_of_it(module):
    torch._dynamo.reset()
    x = torch.randn(2, 9, 12)
    compiled = torch.compile(module(), fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for found, expected in zip(tree_leaves(compiled(x)), tree_leaves(module()(x)), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", OPERATORS)
def test_every_operator_can_be_decomposed(name):
    assert decompositions()[OPERATORS[name].overload] is OPERATORS[name].reference
