"""Low-rank adapters as graph passes: nothing changes when they are added, nor when they are merged."""

from __future__ import annotations

import pytest
import torch

from linearize.errors import RewriteError
from linearize.passes.calibrate import AddAdapters, MergeAdapters, OwnWeights
from linearize.passes.calibrate.add_adapters import ADAPTERS
from linearize.passes.calibrate.distill_end_to_end import projections_of
from linearize.pipeline import run_pipeline
from linearize.program import Program
from tests import zoo

FAMILIES = ["llama", "gpt2", "shared_block", "phi3"]


def logits(program: Program, ids: torch.Tensor) -> torch.Tensor:
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": torch.arange(ids.shape[1])[None]}
    with torch.no_grad():
        made = program.module(*(given[name].expand_as(ids) for name in program.input_names()))
    return made if isinstance(made, torch.Tensor) else made[0]


def moved(program: Program) -> None:
    """Give every B numbers of its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for adapter in program.module.get_submodule(ADAPTERS):
            adapter.b.copy_(0.2 * torch.randn(adapter.b.shape, generator=generator))


@pytest.mark.parametrize("name", FAMILIES)
def test_adapters_start_as_nothing_and_merge_to_what_they_were(name: str) -> None:
    source, ids = zoo.captured(name), zoo.tokens(2, 12)
    names = projections_of(source)
    assert names
    before = {key: value.clone() for key, value in source.module.state_dict().items()}
    adapted = run_pipeline(source, [AddAdapters(names, rank=3)], verify="numerics")
    assert (logits(adapted, ids) - logits(source, ids)).abs().max() <= 1e-6
    moved(adapted)
    assert (logits(adapted, ids) - logits(source, ids)).abs().max() > 1e-2
    merged = run_pipeline(adapted, [MergeAdapters()], verify="numerics")
    assert (logits(merged, ids) - logits(adapted, ids)).abs().max() <= 1e-6
    assert not hasattr(merged.module, ADAPTERS)
    assert len(merged.graph.nodes) == len(source.graph.nodes)
    assert all(torch.equal(value, before[key]) for key, value in source.module.state_dict().items())


def test_an_adapter_has_the_rank_that_was_asked_for() -> None:
    source = zoo.captured("llama")
    (name, *_) = projections_of(source)
    adapted = AddAdapters((name,), rank=2).run(source)
    moved(adapted)
    merged = MergeAdapters().run(adapted)
    change = merged.module.get_parameter(name) - source.module.get_parameter(name)
    assert torch.linalg.matrix_rank(change) == 2


def test_a_name_that_the_graph_does_not_read_is_refused() -> None:
    with pytest.raises(RewriteError, match=r"no.such.weight is no matrix that the graph reads"):
        AddAdapters(("no.such.weight",)).run(zoo.captured("llama"))
    with pytest.raises(RewriteError, match=r"model.norm.weight is no matrix"):
        AddAdapters(("model.norm.weight",)).run(zoo.captured("llama"))


def test_own_weights_leave_the_sources_alone() -> None:
    source = zoo.captured("llama")
    names = projections_of(source)
    own = run_pipeline(source, [OwnWeights(names)])
    with torch.no_grad():
        for name in names:
            own.module.get_parameter(name).zero_()
    assert all(source.module.get_parameter(name).any() for name in names)
    assert own.module.get_parameter("model.norm.weight") is source.module.get_parameter("model.norm.weight")
