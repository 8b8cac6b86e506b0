"""Layers that stay softmax in some way beside slots and MLA: the others are as they were, and files are exported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import linearize
from linearize.calibration.low_rank import whitened_factors
from linearize.export.manifest import read_manifest
from linearize.export.native import STANDARD, lowering_of
from linearize.passes.rewrite import CarryHistory, InsertMixers, LowerRank, RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.plan import LowRankEntry, Plan, PlanEntry
from linearize.program import Program
from tests.export.models import HEADS, SIZES

Layers = tuple[tuple[str, dict[str, Any]], ...]
OTHERS: Layers = (("keep", {}), ("slots", {"window": 3, "slots": 6}), ("mla", {"cache": 0.5}))
ADDED: dict[str, tuple[str, dict[str, Any]]] = {
    "share": ("share", {"of": 0}),
    "q_filters": ("q_filters", {"window": 3, "keep": 6}),
    "citrus": ("citrus", {"window": 3, "keep": 6}),
    "streaming": ("streaming", {"window": 3, "sinks": 2}),
    "moa": ("moa", {"start": [3, 7]}),
    "drop": ("drop", {}),
}


@pytest.fixture(scope="module")
def teacher() -> Program:
    return run_pipeline(linearize.capture(source(4)), [RaiseAttention()])


def source(layers: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **HEADS, "num_hidden_layers": layers})).eval()


def plan(layers: Layers) -> Plan:
    return Plan(
        entries=tuple(
            PlanEntry(site=index, module=f"model.layers.{index}.self_attn", mixer=mixer, options=options)
            for index, (mixer, options) in enumerate(layers)
        )
    )


def student(teacher: Program, last: tuple[str, dict[str, Any]]) -> Program:
    return run_pipeline(teacher, [InsertMixers(plan((*OTHERS, last))), CarryHistory()])


def states(program: Program) -> tuple[Tensor, dict[str, Tensor]]:
    """(logits, every state by name) after two pieces of 24 tokens, one row padded."""
    ids = torch.randint(SIZES["vocab_size"], (2, 24), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    inputs = program.placeholders()
    state = {str(node.target): node.meta["state"].zeros(2) for node in inputs if "state" in node.meta}
    logits = []
    for part in (slice(0, 17), slice(17, 24)):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, part]
        given = {"input_ids": ids[:, part], "attention_mask": mask[:, part], "position_ids": positions, **state}
        with torch.no_grad():
            found, *new = program.module(*(given[str(node.target)] for node in inputs))
        state = dict(zip(program.state_names, new, strict=True))
        logits.append(found)
    return torch.cat(logits, 1), state


def assert_others_are_as_they_were(found: Program, before: Program) -> None:
    logits, state = states(found)
    expected, old = states(before)
    others = [name for name in old if not name.startswith("layers_3_")]
    assert len(others) > 8
    for name in others:
        torch.testing.assert_close(state[name], old[name], rtol=0, atol=1e-6)
    assert (logits - expected).abs().max() > 1e-4


@pytest.mark.parametrize("name", ADDED)
def test_other_layers_are_as_they_were(teacher: Program, name: str) -> None:
    assert_others_are_as_they_were(student(teacher, ADDED[name]), student(teacher, ("keep", {})))


def test_other_layers_are_as_they_were_below_weights_of_low_rank(teacher: Program) -> None:
    entries = [
        LowRankEntry(weight=f"model.layers.3.{name}.weight", rank=2) for name in ("self_attn.o_proj", "mlp.up_proj")
    ]
    before = student(teacher, ("keep", {}))
    batches = [torch.randint(SIZES["vocab_size"], (2, 30), generator=torch.Generator().manual_seed(2))]
    after = run_pipeline(before, [LowerRank(whitened_factors(teacher, entries, batches))])
    assert_others_are_as_they_were(after, before)


@pytest.mark.slow
def test_what_is_new_to_an_exporter_is_exported(tmp_path: Path) -> None:
    layers = (("keep", {}), *(ADDED[name] for name in ("share", "q_filters", "streaming")))
    compiled = linearize.compile(source(4), plan=plan(layers), tokens=0, progress=False)
    with torch.no_grad():
        compiled.source.module.linearize_mixers["2"].filters.normal_()  # type: ignore[index, operator, union-attr]
    verified = read_manifest(linearize.export(compiled, tmp_path / "onnx")).verified
    assert verified is not None
    assert max(verified.largest_logit_difference, verified.largest_state_difference) < 1e-4
    compiled.save_pretrained(tmp_path / "saved")
    ids = torch.randint(61, (2, 20), generator=torch.Generator().manual_seed(3))
    assert torch.equal(linearize.load(tmp_path / "saved")(ids).logits, compiled(ids).logits)


def test_both_flavours_take_standard_operators_for_eviction() -> None:
    assert lowering_of("evict_chunk", "native", False) == lowering_of("evict_chunk", "portable", False) == STANDARD
