"""Predicted costs against what a compiled model allocates and computes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from linearize.mixers import build_mixer, mixer_names
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.planner.costs import base_cost, decode_calls, fixed_state_bytes, site_cost, state_bytes
from linearize.planner.costs import inputs as count_inputs
from linearize.planner.counting import Counting
from linearize.spec import AttentionSpec, MaskSpec, RopeSpec
from tests import zoo

SPEC = AttentionSpec(4, 2, 8, 8, hidden_dim=32, scale=0.35, mask=MaskSpec("causal"))
OPTIONS: dict[str, dict[str, Any]] = {
    "slots": {"slots": 6, "window": 4},
    "window": {"window": 5, "sinks": 2},
    "mla": {"cache": 0.4},
    "share": {"of": 0},
}
ROPE = RopeSpec(8, "half")
SHAPES = {  # as the zoo has them: heads, kv heads, head dim, value dim
    "gqa": replace(SPEC, rope=ROPE),
    "mha": replace(SPEC, kv_heads=4),
    "mqa": replace(SPEC, kv_heads=1, rope=ROPE),
    "other values": replace(SPEC, kv_heads=4, head_dim=16, value_dim=12, rope=ROPE),
    "alibi": replace(SPEC, alibi=(0.5, 0.25, 0.125, 0.1)),
    "bfloat16": replace(SPEC, rope=ROPE, dtype="bfloat16"),
}


def options_for(mixer: str, heads: int) -> dict[str, Any]:
    if mixer != "mixture":
        return dict(OPTIONS.get(mixer, {}))
    last = {"mixer": "window", "kv_heads": [heads - 1], "options": {"window": 3}}
    others = {"mixer": "keep", "kv_heads": list(range(heads - 1))}
    return {"parts": [last, others] if heads > 1 else [last]}


@pytest.mark.parametrize("mixer", mixer_names())
@pytest.mark.parametrize("shape", SHAPES)
def test_predicted_state_is_what_a_mixer_allocates(shape: str, mixer: str) -> None:
    """Every mixer on head shapes with and without grouping: the tensors that come back after 11 tokens of 2 rows."""
    spec = SHAPES[shape]
    options = options_for(mixer, spec.kv_heads)
    made = build_mixer(mixer, spec, options)
    inputs = [torch.ones_like(given, device="cpu") for given in count_inputs(made, 2, 11)]
    inputs[-1] = torch.arange(11).expand(2, 11)
    with torch.no_grad():
        new = made(*inputs, *(tensor.zeros(2) for tensor in made.state()))[1:]
    allocated = sum(tensor.numel() * tensor.element_size() for tensor in new)
    assert state_bytes(spec, mixer, options, 11, 2) == allocated


def test_predicted_state_of_a_plan_is_what_a_compiled_model_allocates() -> None:
    """Counts of tokens and what other layers carry included."""
    for model, planned in (("llama", ("mixture", "keep")), ("lfm2", ("slots",))):
        program = zoo.captured(model)
        entries = tuple(
            PlanEntry(site=site.index, module=site.module, mixer=mixer, options=options_for(mixer, 2))
            for site, mixer in zip(program.matched, planned, strict=True)
        )
        compiled = zoo.compile_again(model, plan=Plan(entries=entries), tokens=0)
        _, state = compiled.step(zoo.tokens(2, 11))
        predicted = fixed_state_bytes(run_pipeline(program, [RaiseAttention()]), batch=2) + sum(
            state_bytes(site.attention, entry.mixer, entry.options, 11, 2)
            for site, entry in zip(program.matched, entries, strict=True)
        )
        assert predicted == state.nbytes


def test_weights_are_those_of_the_mixer() -> None:
    cost = site_cost(SPEC, "lolcats", {"features": 3, "window": 4}, 64)
    assert cost.weight_bytes == 4 * (4 * 8 * 3 + 2 * 8 * 3 + 4)


def test_a_cache_moves_more_by_context_and_a_window_does_not() -> None:
    kept = [site_cost(SPEC, "keep", {}, context) for context in (64, 128)]
    window = [site_cost(SPEC, "window", {"window": 8}, context) for context in (64, 128)]
    assert kept[1].moved_bytes > 1.8 * kept[0].moved_bytes
    assert window[0].moved_bytes == window[1].moved_bytes
    assert window[0].operations == window[1].operations < kept[0].operations


def test_operations_of_attention_are_two_products_by_key() -> None:
    cost = site_cost(SPEC, "keep", {}, 99)
    by_attention = next(call for call in cost.calls if call.name == "attention")
    assert by_attention.operations == 2 * 4 * 100 * (8 + 8)
    causal = 2 * 4 * (8 + 8) * sum(range(1, 100))
    others = site_cost(SPEC, "keep", {}, 99).prefill_operations - causal
    assert 0 <= others < causal / 10


def test_costs_grow_with_the_batch_alike() -> None:
    one, four = (site_cost(SPEC, "slots", {"slots": 8, "window": 4}, 64, batch) for batch in (1, 4))
    assert four.state_bytes == 4 * one.state_bytes
    assert four.operations == 4 * one.operations
    assert len(four.calls) == len(one.calls)


def test_a_dropped_attention_takes_its_projections_along() -> None:
    teacher = run_pipeline(zoo.captured("llama"), [RaiseAttention()])
    base = base_cost(teacher)
    products = [call for call in base.feeding[0] if call.name == "mm"]
    assert len(products) == 3
    plans = [
        [PlanEntry(site=site.index, module=site.module, mixer=mixer) for site in teacher.matched]
        for mixer in ("drop", "window")
    ]
    dropped, kept = (decode_calls(base, teacher.matched, entries, 64, 1) for entries in plans)
    assert sum(call.name == "mm" for call in kept) - sum(call.name == "mm" for call in dropped) == 3 * 2


def test_the_count_is_that_of_a_real_step() -> None:
    """As many products of matrices as the compiled model dispatches, and the same arithmetic in them."""
    program = zoo.captured("llama")
    entries = tuple(
        PlanEntry(site=site.index, module=site.module, mixer="window", options={"window": 4})
        for site in program.matched
    )
    compiled = zoo.compile_again("llama", plan=Plan(entries=entries), tokens=0)
    _, state = compiled.step(zoo.tokens(1, 9))
    with torch.no_grad(), Counting() as real:
        compiled.step(zoo.tokens(1, 1), state)
    base = base_cost(run_pipeline(program, [RaiseAttention()]))
    planned = decode_calls(base, program.matched, entries, 9, 1)
    for name in ("mm", "hybrid_ring"):
        found, expected = ([call for call in calls if call.name == name] for calls in (planned, real.calls))
        assert sorted(call.operations for call in found) == sorted(call.operations for call in expected)
        assert found


def test_eviction_costs_what_it_reads_and_a_comparison_once_a_block() -> None:
    """By hand: 4 heads read 2 x 4 + 6 keys and values of 8, and every 4 tokens 2 heads score and compare 10 tokens."""
    for mixer in ("q_filters", "citrus"):
        calls = site_cost(SPEC, mixer, {"keep": 6, "window": 4}, 64).calls
        (call,) = (call for call in calls if call.name == "evict_chunk")
        assert call.operations == 2 * 4 * (2 * 4 + 6) * (8 + 8) + 2 * 10 * (10 + 8) // 4
