"""Every mixer is one function in four forms: parallel, recurrent, step by step, in pieces; padded or not."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx

from linearize.mixers import Mixer, build_mixer
from linearize.ops import OPERATORS
from linearize.rewriting.editor import InliningTracer
from linearize.spec import AttentionSpec, MaskSpec, RopeSpec

MIXERS: tuple[tuple[str, dict], ...] = (
    ("window", {}),
    ("window", {"sinks": 2}),
    ("streaming", {"sinks": 2}),
    ("lolcats", {}),
    ("lolcats", {"sinks": 2, "features": 3, "maps": True}),
    ("moments", {}),
    ("moments", {"sinks": 2}),
    ("slots", {"slots": 3}),
    ("slots", {"slots": 6, "sinks": 2, "rounds": 2, "decay": 0.75}),
    ("q_filters", {"keep": 5, "sinks": 2}),
    ("citrus", {"keep": 5, "sinks": 1, "memory": 0.5}),
    ("lizard", {}),
    ("lizard", {"features": 3, "sink_logits": 1, "maps": True}),
    ("liger", {}),
    ("liger", {"pool": 2, "sinks": 1}),
    ("gla", {}),
    ("gla", {"features": 3, "rank": 2, "maps": True}),
    ("deltanet", {"conv": 3, "output_gate": True}),
    ("gated_deltanet", {}),
    ("mamba2", {"conv": 2, "output_gate": True}),
    ("lightning", {"fit_decay": True}),
    ("mixture", {}),
    ("keep", {}),
    ("mla", {}),
    ("mla", {"rank": 2, "rope_dims": 2}),
)
CACHED = ("keep", "mla")
IDS = [f"{name}{'-'.join(['', *options])}" for name, options in MIXERS]
every_mixer = pytest.mark.parametrize(("name", "options"), MIXERS, ids=IDS)


ROPES = {
    "half": RopeSpec(4, "half"),
    "interleaved": RopeSpec(4, "interleaved"),
    "partial": RopeSpec(2, "half"),
    "none": None,
}


@dataclass(frozen=True)
class Case:
    """A mixer's sizes: H query heads over G kv heads, window w, B rows of T tokens; row b starts after padding[b]."""

    heads: int
    kv_heads: int
    window: int
    batch: int
    length: int
    padding: tuple[int, ...]
    rope: str
    seed: int

    def mixer(self, kind: str, options: dict) -> Mixer:
        spec = AttentionSpec(
            heads=self.heads, kv_heads=self.kv_heads, head_dim=4, value_dim=3, hidden_dim=5, scale=0.6,
            mask=MaskSpec("causal"), rope=ROPES[self.rope],
        )  # fmt: skip
        if kind == "mixture":
            options = {"parts": mixture_parts(self.kv_heads)}
        windowed = {} if kind in (*CACHED, "mixture") else {"window": self.window}
        mixer = build_mixer(kind, spec, {**windowed, **options})
        generator = torch.Generator().manual_seed(self.seed)
        with torch.no_grad():
            for name, parameter in mixer.named_parameters():
                start = 0 if name == "omega" else parameter  # the far field starts muted
                parameter.copy_(start + 0.5 * torch.randn(parameter.shape, generator=generator))
            if kind == "q_filters":
                mixer.filters.copy_(torch.randn(mixer.filters.shape, generator=generator))  # type: ignore[operator]
        return mixer

    def inputs(self, mixer: Mixer) -> list[Tensor]:
        """query, key, value and what the mixer needs beyond them, tokens in dim 2 (hidden: dim 1)."""
        generator = torch.Generator().manual_seed(self.seed + 1)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        plain_q = draw(self.batch, self.heads, self.length, 4)
        plain_k = draw(self.batch, self.kv_heads, self.length, 4)
        value = draw(self.batch, self.kv_heads, self.length, 3)
        ranks = self.positions()[:, None, :, None]
        named = {
            "query_unrotated": plain_q,
            "key_unrotated": plain_k,
            "hidden": draw(self.batch, self.length, 5),
        }
        query, key = (rotate(x, ranks, self.rope) for x in (plain_q, plain_k))
        return [query, key, value, *(named[need] for need in mixer.needs)]

    def mask(self) -> Tensor:
        return torch.arange(self.length)[None, :] >= torch.tensor(self.padding)[:, None]

    def positions(self) -> Tensor:
        return (torch.arange(self.length)[None, :] - torch.tensor(self.padding)[:, None]).clamp_min(-1)


def mixture_parts(kv_heads: int) -> list[dict]:
    """The last kv head with a recurrence, the others (if any) with a window."""
    parts = [{"mixer": "gated_deltanet", "kv_heads": [kv_heads - 1], "options": {"window": 2}}]
    others = [{"mixer": "window", "kv_heads": list(range(kv_heads - 1))[::-1], "options": {"window": 3}}]
    return parts + others if kv_heads > 1 else parts


def rotate(x: Tensor, ranks: Tensor, kind: str) -> Tensor:
    """Rotary embedding of 4 dims by rank and rank / 10: pairs (i, i + 2), (2 i, 2 i + 1), (0, 1) alone, or none."""
    if kind == "none":
        return x
    angles = ranks.float() * torch.tensor([1.0] if kind == "partial" else [1.0, 0.1])
    a, b = {"half": (x[..., :2], x[..., 2:]), "interleaved": (x[..., ::2], x[..., 1::2])}.get(
        kind, (x[..., :1], x[..., 1:2])
    )
    turned = a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()
    if kind == "interleaved":
        return torch.stack(turned, dim=-1).flatten(-2)
    return torch.cat([*turned, x[..., 2:]] if kind == "partial" else turned, dim=-1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    window = draw(st.integers(1, 5))
    lengths = [1, max(1, window - 1), window, window + 1, 2 * window + 3]
    batch, length = draw(st.sampled_from([1, 3])), draw(st.sampled_from(lengths))
    padding = draw(st.lists(st.integers(0, length - 1), min_size=batch, max_size=batch))
    padding[0] = 0
    rope, seed = draw(st.sampled_from([*ROPES])), draw(st.integers(0, 99))
    return Case(4, kv_heads, window, batch, length, tuple(padding), rope, seed)


def run(
    mixer: Mixer, inputs: list[Tensor], mask: Tensor, positions: Tensor, pieces: list[int] | None = None
) -> tuple[Tensor, list[Tensor]]:
    """(outputs [B,H,T,dv], state after) of the tokens fed in `pieces`, from an empty state."""
    state, outputs, start = [tensor.zeros(mask.shape[0]) for tensor in mixer.state()], [], 0
    for piece in pieces or [mask.shape[1]]:
        part = slice(start, start + piece)
        new = [x[:, part] if x.ndim == 3 else x[:, :, part] for x in inputs]
        output, *state = mixer(*new, mask[:, part], positions[:, part], *state)
        outputs.append(output)
        start += piece
    return torch.cat(outputs, dim=2), list(state)


@contextmanager
def operators_as(form: str) -> Iterator[None]:
    """Run every operator of ours in the named form instead of through the dispatcher."""
    calls = mock.Mock(**{f"{name}.default.side_effect": getattr(op, form) for name, op in OPERATORS.items()})
    with mock.patch.object(torch.ops, "linearize", calls):
        yield
    assert calls.mock_calls


def assert_close(actual: Tensor, expected: Tensor, mask: Tensor | None = None, tolerance: float = 1e-4) -> None:
    if mask is not None:
        actual, expected = (x.transpose(1, 2)[mask] for x in (actual, expected))
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


@every_mixer
@given(case=cases())
@settings(max_examples=20)
def test_steps_and_pieces_equal_one_call(name: str, options: dict, case: Case) -> None:
    mixer = case.mixer(name, options)
    inputs, mask, positions = case.inputs(mixer), case.mask(), case.positions()
    whole, state = run(mixer, inputs, mask, positions)
    assert bool(torch.isfinite(whole).all())
    cut = case.length // 2
    for pieces in ([1] * case.length, [cut, case.length - cut], [case.length - 1, 1]):
        actual, after = run(mixer, inputs, mask, positions, [piece for piece in pieces if piece])
        assert_close(actual, whole, mask)
        for found, expected in zip(after, state, strict=True):
            assert found.dtype == expected.dtype
            assert_close(found.float(), expected.float())


@every_mixer
@given(case=cases())
@settings(max_examples=15)
def test_forms_of_the_operators_agree(name: str, options: dict, case: Case) -> None:
    mixer = case.mixer(name, options)
    arguments = (mixer, case.inputs(mixer), case.mask(), case.positions())
    dispatched, state = run(*arguments)
    for form in ("recurrence", "reference", "streamed"):
        with operators_as(form):
            actual, after = run(*arguments)
        assert_close(actual, dispatched, case.mask())
        for found, expected in zip(after, state, strict=True):
            assert_close(found.float(), expected.float())


@every_mixer
@given(case=cases())
@settings(max_examples=8)
def test_the_mixer_written_into_a_graph_is_the_mixer(name: str, options: dict, case: Case) -> None:
    """As `passes/lower` does it: operators on nodes, no module left, and no size read from the example."""
    mixer = case.mixer(name, options)
    inputs, mask, positions = case.inputs(mixer), case.mask(), case.positions()
    root = torch.nn.Module()
    root.add_module("mixer", mixer)
    graph = fx.Graph()
    given = [graph.placeholder(f"x{i}") for i in range(len(inputs) + 2 + len(mixer.state()))]
    graph.output(tuple(InliningTracer(root, graph).inline("mixer", given)))
    module = fx.GraphModule(root, graph)
    assert not any(node.op == "call_module" for node in graph.nodes)
    for length in (case.length, 1):
        now = [x[:, :length] if x.ndim == 3 else x[:, :, :length] for x in inputs]
        arguments = *now, mask[:, :length], positions[:, :length], *(s.zeros(case.batch) for s in mixer.state())
        for found, expected in zip(module(*arguments), mixer(*arguments), strict=True):
            torch.testing.assert_close(found, expected)


@every_mixer
@given(case=cases())
@settings(max_examples=15)
def test_a_left_padded_row_equals_the_row_alone(name: str, options: dict, case: Case) -> None:
    mixer = case.mixer(name, options)
    inputs = case.inputs(mixer)
    batched, _ = run(mixer, inputs, case.mask(), case.positions())
    for row, padding in enumerate(case.padding):
        alone = [x[row : row + 1, padding:] if x.ndim == 3 else x[row : row + 1, :, padding:] for x in inputs]
        length = case.length - padding
        mask, positions = torch.ones(1, length, dtype=torch.bool), torch.arange(length)[None]
        expected, _ = run(mixer, alone, mask, positions)
        assert_close(batched[row : row + 1, :, padding:], expected)


@every_mixer
@given(case=cases())
@settings(max_examples=10)
def test_what_stands_at_padding_does_not_matter(name: str, options: dict, case: Case) -> None:
    mixer = case.mixer(name, options)
    inputs, mask, positions = case.inputs(mixer), case.mask(), case.positions()
    expected, _ = run(mixer, inputs, mask, positions)
    loud = [torch.where(mask[:, :, None] if x.ndim == 3 else mask[:, None, :, None], x, 30.0) for x in inputs]
    actual, _ = run(mixer, loud, mask, positions)
    assert_close(actual, expected, mask)


@every_mixer
@given(case=cases(), order=st.permutations([0, 1, 2]))
@settings(max_examples=10)
def test_rows_of_a_batch_do_not_meet(name: str, options: dict, case: Case, order: list[int]) -> None:
    mixer = case.mixer(name, options)
    rows = torch.tensor(order[: case.batch] if case.batch == 3 else [0])
    inputs, mask, positions = case.inputs(mixer), case.mask(), case.positions()
    expected, state = run(mixer, inputs, mask, positions)
    actual, after = run(mixer, [x[rows] for x in inputs], mask[rows], positions[rows])
    assert_close(actual, expected[rows])
    for found, kept in zip(after, state, strict=True):
        assert_close(found.float(), kept[rows].float())


@every_mixer
def test_state_shapes_do_not_change_with_the_length_and_bytes_are_counted(name: str, options: dict) -> None:
    case = Case(4, 2, 3, 3, 11, (0, 2, 4), "half", 0)
    mixer = case.mixer(name, options)
    inputs, mask, positions = case.inputs(mixer), case.mask(), case.positions()
    for pieces, seen in (([11], 11), ([1] * 11, 11), ([5, 6], 11)):
        _, state = run(mixer, inputs, mask, positions, pieces)
        for declared, tensor in zip(mixer.state(), state, strict=True):
            assert declared.bytes(3, context=seen) == tensor.numel() * tensor.element_size()
            assert declared.dtype == tensor.dtype
            if declared.grows is None:
                assert tensor.shape == (3, *declared.shape)
            else:
                assert tensor.shape[1 + declared.grows] == seen
    assert any(declared.grows is not None for declared in mixer.state()) == (name in CACHED)


@every_mixer
@pytest.mark.parametrize("magnitude", [1.0, 40.0])
def test_gradients_are_finite_and_reach_every_parameter(name: str, options: dict, magnitude: float) -> None:
    case = Case(4, 2, 3, 3, 11, (0, 2, 10), "half", 3)
    mixer = case.mixer(name, options)
    inputs = [(magnitude * x).requires_grad_() for x in case.inputs(mixer)]
    output, _ = run(mixer, inputs, case.mask(), case.positions())
    output.transpose(1, 2)[case.mask()].square().sum().backward()
    for tensor in [*inputs, *mixer.parameters()]:
        assert tensor.grad is not None
        assert bool(torch.isfinite(tensor.grad).all())
        assert magnitude > 1 or bool((tensor.grad != 0).any())


@every_mixer
def test_gradients_equal_finite_differences(name: str, options: dict) -> None:
    case = Case(2, 1, 2, 1, 5, (0,), "half", 4)
    mixer = case.mixer(name, options).double()
    mixer.dtype = torch.float64
    inputs = [x.double() for x in case.inputs(mixer)]
    value = inputs[2].requires_grad_()

    def loss(values: Tensor) -> Tensor:
        state = [tensor.zeros(1) for tensor in mixer.state()]
        state = [tensor.double() if tensor.is_floating_point() else tensor for tensor in state]
        arguments = [inputs[0], inputs[1], values, *inputs[3:]]
        return mixer(*arguments, case.mask(), case.positions(), *state)[0].sin().sum()

    assert torch.autograd.gradcheck(loss, (value,))
