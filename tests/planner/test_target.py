"""Targets: the roofline, what was timed, files; and a source's own step counted at any context."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import linearize
from linearize.errors import DataError, RecipeError
from linearize.planner.counting import MODULE, VIEW, Call, Counting
from linearize.planner.reference import LONG, SHORT, settle
from linearize.planner.source import source_calls
from linearize.planner.target import FAR, H200, NEAR, Target, along, load_target
from linearize.runtime.speed import filled_cache
from tests import zoo

TARGET = Target(name="mine", bandwidth=1e9, rate=1e12, overhead=1e-6, view_overhead=1e-7, node_overhead=2e-6)


def test_an_operator_takes_what_binds_it() -> None:
    by_bytes, by_work = Call("mul", 10**6, 10), Call("mm", 10, 10**9)
    assert TARGET.seconds([by_bytes], graph=False) == pytest.approx(1e-6 + 1e-3)
    assert TARGET.seconds([by_work], graph=False) == pytest.approx(1e-6 + 1e-3)
    assert TARGET.seconds([Call(VIEW, 0, 0), Call(MODULE, 0, 0)]) == pytest.approx(1e-7 + 2 * 2e-6)


def test_what_was_timed_is_read_along_its_line() -> None:
    points = [(100.0, 1.0, 3.0), (200.0, 2.0, 4.0)]
    assert [along(points, at, 0.0) for at in (50, 150, 300)] == [1.0, 1.5, 3.0]
    assert along(points, 150, 0.5) == 2.5
    timed = TARGET.model_copy(update={"timed": {"cat": [(0.0, 1.0, 3.0)]}})
    alone = [timed.seconds([Call("cat", size, 0)], graph=False) for size in (NEAR // 2, FAR * 2)]
    assert alone == [1.0, 3.0]
    assert timed.seconds([Call("cat", 8, 0)], graph=False, within=[Call("mul", FAR, 0)]) == 3.0


def test_targets_are_found_by_name_or_file(tmp_path: Path) -> None:
    assert load_target("h200") is H200
    file = tmp_path / "mine.json"
    file.write_text(TARGET.model_dump_json())
    assert load_target(str(file)) == TARGET
    file.write_text('{"name": "mine"}')
    with pytest.raises(RecipeError, match=r"mine.json: bandwidth: Field required"):
        load_target(str(file))
    with pytest.raises(RecipeError, match="cannot read the target"):
        load_target(str(tmp_path / "other.json"))
    with pytest.raises(RecipeError, match="there are cpu and h200"):
        load_target("tpu")


def test_a_sources_step_is_counted_at_a_context_that_was_not_run() -> None:
    source = zoo.source("llama")
    predicted = [call for call in source_calls(source, 512) if call.name != MODULE]
    tokens = torch.ones(1, 512, dtype=torch.int64)
    cache = filled_cache(source, tokens, 512)
    with torch.no_grad(), Counting() as counting:
        source(tokens[:, -1:], past_key_values=cache, use_cache=True)
    assert predicted == counting.calls


def test_a_source_without_a_cache_is_told() -> None:
    with pytest.raises(DataError, match="is no transformers model"):
        source_calls(torch.nn.Linear(2, 2), 64)


def test_whole_steps_settle_what_operators_take_in_one() -> None:
    """Measured in turn: slots, the source, all kept at both contexts, the source at both."""
    line = [(0.0, 1e-6, 1e-6), (1e9, 2e-6, 2e-6)]
    steps = iter([5e-2, 4e-2, 6e-2, 9e-2, 4e-2, 8e-2])
    source = AutoModelForCausalLM.from_pretrained(linearize.demo_model_dir()).eval()
    theirs = next(call.name for call in source_calls(source, SHORT) if "dot_product" in call.name)
    start = TARGET.model_copy(update={"timed": {name: line for name in ("attention", theirs)}})
    found = settle(start, lambda functions, seconds: [function() for function in functions] and next(steps))
    taken = [found.seconds(source_calls(source, context), graph=False) for context in (SHORT, LONG)]
    assert taken[1] - taken[0] == pytest.approx(8e-2 - 4e-2, rel=1e-3)
    assert found.node_overhead > start.node_overhead
    assert found.module_overhead > start.module_overhead
    assert not list(steps)
