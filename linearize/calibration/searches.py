"""Searches on data that complete a recipe's plan: windows by head, shared caches, ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearize.calibration.head_windows import choose_windows
from linearize.calibration.kv_sharing import choose_sharing
from linearize.calibration.low_rank import choose_ranks
from linearize.calibration.teacher import TeacherStream
from linearize.errors import RecipeError
from linearize.plan import Plan
from linearize.program import Program
from linearize.progress import Progress
from linearize.recipe import Recipe


def search_plan(
    teacher: Program, recipe: Recipe, plan: Plan, data: Callable[[], list[Tensor]], progress: Progress
) -> Plan:
    """`plan` after the recipe's searches over the batches int64 [B, T] that `data` gives, on a raised program.

    Raises:
        RecipeError: there is something to search for, and the model has no weights.
    """
    if not recipe.searches or not teacher.matched:
        return plan
    if teacher.device.type == "meta":
        raise RecipeError(f"recipe {recipe.name} searches on data, and the model has no weights; write a plan instead")
    if recipe.low_rank is not None:
        plan = plan.model_copy(update={"low_rank": choose_ranks(teacher, recipe.low_rank)})
    with torch.no_grad():
        if recipe.head_windows is not None:
            plan = _with_windows(teacher, recipe, plan, data(), progress)
        if recipe.kv_sharing is not None:
            plan = _with_sharing(teacher, recipe, plan, data(), progress)
    return plan


def _with_windows(teacher: Program, recipe: Recipe, plan: Plan, batches: list[Tensor], progress: Progress) -> Plan:
    table = recipe.head_windows
    assert table is not None
    sites = [entry.site for entry in plan.entries if entry.mixer == "moa"]
    stream = TeacherStream(teacher, batches)
    rules = choose_windows(stream, sites, table.context, table.mean, table.sinks, progress)
    options = {
        site: {
            "start": [alpha for alpha, _ in found], "growth": [beta for _, beta in found],
            "context": table.context, "sinks": table.sinks,
        }
        for site, found in rules.items()
    }  # fmt: skip
    return _changed(plan, {site: ("moa", given, "windows by the head's error") for site, given in options.items()})


def _with_sharing(teacher: Program, recipe: Recipe, plan: Plan, batches: list[Tensor], progress: Progress) -> Plan:
    table = recipe.kv_sharing
    assert table is not None
    kept = [entry.site for entry in plan.entries if entry.mixer == "keep"]
    sources = choose_sharing(teacher, batches, kept, table.share, table.threshold, progress)
    return _changed(
        plan, {site: ("share", {"of": found.of}, found.reason) for site, found in sources.items()}
    )


def _changed(plan: Plan, changes: dict[int, tuple[str, dict[str, Any], str]]) -> Plan:
    entries = [
        entry.model_copy(update=dict(zip(("mixer", "options", "reason"), changes[entry.site], strict=True)))
        if entry.site in changes else entry
        for entry in plan.entries
    ]  # fmt: skip
    return plan.model_copy(update={"entries": tuple(entries)})
