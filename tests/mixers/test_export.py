"""One ONNX file with every recurrent mixer in it: the exporter's own check compares it with PyTorch."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import linearize
from linearize.export.manifest import read_manifest
from linearize.plan import Plan, PlanEntry
from tests.export.models import HEADS, SIZES

LAYERS = (
    ("liger", {"window": 8, "pool": 2}),
    ("gla", {"window": 8, "features": 4, "rank": 2}),
    ("gated_deltanet", {"window": 8, "conv": 2}),
    ("mamba2", {"window": 0, "conv": 3, "output_gate": True}),
    ("lightning", {"window": 8, "sinks": 1}),
    ("moments", {"window": 8, "sinks": 1}),
    ("drop", {}),
    ("mixture", {"parts": [{"mixer": "keep", "kv_heads": [1]}, {"mixer": "window", "kv_heads": [0]}]}),
)


def test_every_recurrent_mixer_is_exported_and_saved(tmp_path: Path) -> None:
    compiled = linearize.compile(source(), "window", plan=plan(), tokens=0, progress=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in compiled.source.module.linearize_mixers.parameters():  # type: ignore[union-attr]
            parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    verified = read_manifest(linearize.export(compiled, tmp_path / "onnx")).verified
    assert verified is not None
    assert max(verified.largest_logit_difference, verified.largest_state_difference) < 1e-4
    compiled.save_pretrained(tmp_path / "saved")
    ids = torch.randint(61, (2, 20), generator=generator)
    assert torch.equal(linearize.load(tmp_path / "saved")(ids).logits, compiled(ids).logits)


def source() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **HEADS, "num_hidden_layers": len(LAYERS)})).eval()


def plan() -> Plan:
    return Plan(
        entries=tuple(
            PlanEntry(site=index, module=f"model.layers.{index}.self_attn", mixer=mixer, options=options)
            for index, (mixer, options) in enumerate(LAYERS)
        )
    )
