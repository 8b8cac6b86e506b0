"""Traces: the piece program of mixers that loop over blocks, whose sizes a trace must not take for something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from linearize.export.torchscript import PIECE, check, trace
from linearize.plan import Plan, PlanEntry
from tests import zoo

BLOCKS: dict[str, dict[str, Any]] = {
    "slots": {"slots": 8, "window": 24, "rounds": 2, "sinks": 1, "decay": 0.97},
    "citrus": {"keep": 8, "window": 32},
    "q_filters": {"keep": 8, "window": 32},
}


@pytest.mark.slow
@pytest.mark.parametrize("mixer", BLOCKS)
def test_a_traced_piece_is_what_pytorch_computes(mixer: str) -> None:
    entries = [
        PlanEntry(site=site.index, module=site.module, mixer=mixer, options=BLOCKS[mixer])
        for site in zoo.captured("llama").matched
    ]
    compiled = zoo.compile_again("llama", plan=Plan(entries=tuple(entries)), tokens=0)
    with torch.no_grad():
        assert check(compiled, trace(compiled, PIECE), PIECE) < 1e-4
