"""Only what can be exported: which candidates the ways of exporting take that the user means to use.

What a way takes is asked of `linearize.export`, by the states that a mixer declares; of a mixer of the user's own also
whether its operators can be said in the format. What no mixer changes is looked at once: the model itself.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence

import torch

from linearize.errors import RecipeError
from linearize.export.trial import operator_refusal
from linearize.export.ways import Way, program_refusal, way_of
from linearize.mixers import build_mixer, mixer_class
from linearize.passes.rewrite import CarryHistory, InsertMixers
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.planner.candidates import Candidate, Options
from linearize.planner.costs import inputs, on_meta
from linearize.program import Program, StateTensor
from linearize.spec import AttentionSpec, Site

OWN = "linearize.mixers."  # modules of mixers that the tests export


def ways_of(names: Sequence[str]) -> tuple[Way, ...]:
    """Raises ExportError where there is no way of that name."""
    return tuple(dict.fromkeys(way_of(name) for name in names))


def refusal(site: Site, one: Candidate, ways: Sequence[Way]) -> str | None:
    """Why one of the ways does not take the candidate at the site, or None."""
    found = (_refusal(site.attention, one.mixer, one.options, way) for way in ways)
    return next((reason for reason in found if reason is not None), None)


@functools.lru_cache(maxsize=4096)
def _refusal(spec: AttentionSpec, mixer: str, options: Options, way: Way) -> str | None:
    made = on_meta(spec, mixer, json.dumps(dict(options), sort_keys=True))
    growing = way.growing(made.state())
    if growing is not None or mixer_class(mixer).__module__.startswith(OWN):
        return growing
    real = build_mixer(mixer, spec, dict(options)).eval()
    given = [torch.zeros_like(tensor, device="cpu") for tensor in inputs(real, 2, 5)]
    return operator_refusal(real, [*given, *(tensor.zeros(2) for tensor in real.state())], way)


def check_model(teacher: Program, ways: Sequence[Way]) -> None:
    """The model can be exported but for its attentions.

    Raises:
        RecipeError: it cannot, whatever they become.
    """
    if not ways:
        return
    known = program_refusal(teacher)
    if known is not None:
        raise RecipeError(_impossible(teacher, ways[0].name, known))
    entries = tuple(PlanEntry(site=site.index, module=site.module, mixer="drop") for site in teacher.matched)
    program = run_pipeline(teacher, [InsertMixers(Plan(entries=entries)), CarryHistory()])
    specs: list[StateTensor] = [node.meta["state"] for node in program.placeholders() if "state" in node.meta]
    reasons = [(ways[0].name, program_refusal(program)), *((way.name, way.growing(specs)) for way in ways)]
    for name, reason in reasons:
        if reason is not None:
            raise RecipeError(_impossible(teacher, name, reason))


def _impossible(teacher: Program, way: str, reason: str) -> str:
    return f"no plan of {teacher.model_name} can be exported ({way}): {reason}"


def taken(
    site: Site, candidates: Sequence[Candidate], ways: Sequence[Way]
) -> tuple[list[Candidate], dict[str, list[str]]]:
    """(those that all ways take, {why not: the mixers that they do not})."""
    kept: list[Candidate] = []
    left_out: dict[str, list[str]] = {}
    for one in candidates:
        reason = refusal(site, one, ways)
        if reason is None:
            kept.append(one)
        elif one.mixer not in left_out.setdefault(reason, []):
            left_out[reason].append(one.mixer)
    return kept, left_out


def check_states(stateless: bool, ways: Sequence[Way]) -> None:
    """Some site has a state, where a way needs one.

    Raises:
        RecipeError: every plan is `stateless`.
    """
    needing = [way.name for way in ways if way.needs_state]
    if stateless and needing:
        raise RecipeError(
            f"{needing[0]} carries states by layer, and the best plan has none in any: raise the budget, or never drop"
        )
