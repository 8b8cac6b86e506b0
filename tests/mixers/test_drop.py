"""`drop` in a whole model: what is left of an attention block, as hooks on the source show it."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.plan import Plan, PlanEntry
from tests import zoo


def replaced(_module: Any, _inputs: Any, output: tuple[Tensor, ...], *, left: Tensor | float) -> tuple[Any, ...]:
    return (torch.zeros_like(output[0]) + left, *output[1:])


@pytest.mark.parametrize(
    ("family", "layers", "attention", "bias"),
    [("llama", "model.layers", "self_attn", ""), ("gpt2", "transformer.h", "attn", "c_proj.bias")],
)
def test_of_a_dropped_attention_only_the_output_projections_bias_is_left(
    family: str, layers: str, attention: str, bias: str
) -> None:
    source, ids = zoo.source(family), zoo.tokens(2, 9)
    block = source.get_submodule(f"{layers}.0.{attention}")
    sites = zoo.captured(family).matched
    entries = [PlanEntry(site=site.index, module=site.module, mixer="keep") for site in sites]
    entries[0] = entries[0].model_copy(update={"mixer": "drop"})
    compiled = zoo.compile_again(family, plan=Plan(entries=tuple(entries)), tokens=0)
    left = block.get_parameter(bias) if bias else 0.0
    handle = block.register_forward_hook(partial(replaced, left=left))
    with torch.no_grad():
        expected, found = source(ids).logits, compiled(ids).logits
        handle.remove()
        before = source(ids).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert (before - expected).abs().max() > 1e-3
