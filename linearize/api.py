"""compile(): the whole compiler in one screen; each line leads to one folder."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from linearize.calibration.data import checked_batches, split_rows
from linearize.calibration.keys import tokens_key
from linearize.calibration.low_rank import whitened_factors
from linearize.calibration.parallel import world
from linearize.calibration.samples import sample_teacher
from linearize.calibration.scores import site_scores
from linearize.calibration.searches import search_plan
from linearize.capture.torch_export import capture
from linearize.errors import RewriteError
from linearize.passes.calibrate import CalibrateOutputs, DistillEndToEnd
from linearize.passes.lower import LOWER_PASSES
from linearize.passes.rewrite import CarryHistory, InsertMixers, LowerRank, RaiseAttention, keep_worst, read_carried
from linearize.pipeline import run_pipeline
from linearize.plan import Plan
from linearize.plan_file import read_plan
from linearize.program import Program
from linearize.progress import Progress
from linearize.recipe import Recipe
from linearize.report import Report, SiteReport
from linearize.runtime.model import LinearizedModel
from linearize.spec import NoMatch, Site
from linearize.verify import check_state_threading

SCORE_TOKENS = 4096


def compile(
    model: nn.Module | ExportedProgram | Program,
    recipe: str | Path | Recipe = "auto",
    *,
    calibration: Iterable[torch.Tensor] | None = None,
    plan: Plan | str | Path | None = None,
    tokens: int | None = None,
    distill: int | None = None,
    seed: int = 0,
    progress: bool = True,
    checkpoints: str | Path | None = None,
) -> LinearizedModel:
    """Replace a decoder-only model's softmax attention by mixers with a fixed-size state.

    Args:
        model: any `nn.Module` that maps token ids int64 [B, T] to logits, transformers or not, or what `capture` or
            `torch.export` made of it. It is left as it was; the result shares its parameters.
        recipe: a name from `linearize.recipes()`, with options (`"lolcats{window=32}"`), a `.toml` path or a Recipe.
        calibration: batches of token ids int64 [B, T] to fit on; None draws the teacher's own samples.
        plan: what each site becomes, or a file of it (`linearize plan` writes one), and how it is fitted where it says
            so; None lets the recipe decide.
        tokens: how many tokens to fit on; None takes the recipe's number, 0 leaves the mixers at their start.
        distill: how many tokens to train the whole model on afterwards, by KL to the source's logits; None takes the
            recipe's number (none in the built-in ones). The better weights stay, by KL on held-out data.
        seed: of samples and of the fit; the same numbers on the same machine.
        progress: draw progress bars on stderr.
        checkpoints: a folder in which fitted sites are kept, so that the same call goes on after an interruption and
            ends the same; it is made when there is something to keep, and yours to remove.

    Returns:
        A LinearizedModel; sites that could not be matched are in its `report.refused`, left as they were.

    Raises:
        CaptureError, RecipeError, RewriteError, DataError, VerificationError: each says what, where, and what to do.
    """
    policy = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    captured = capture(model)
    check_dynamic(captured)
    check_sites(captured, policy)
    teacher = run_pipeline(captured, [RaiseAttention()])
    share = policy.keep_worst if plan is None else 0.0
    if isinstance(plan, str | Path):
        file = read_plan(plan)
        file.check(captured.matched)
        plan = file.plan
    whole = policy.distill if distill is None else policy.distill.model_copy(update={"tokens": distill})
    looks = policy.wanted_scores() or policy.searches if plan is None else plan.low_rank
    again = whole.tokens > 0 or looks
    if again and calibration is not None and not isinstance(calibration, Sequence):
        calibration = list(calibration)  # read more than once: to score, to fit, to distill
    plan = plan or plan_sites(teacher, policy, calibration, seed, progress)
    plan.check([site.index for site in captured.matched])
    student = run_pipeline(teacher, [InsertMixers(plan), CarryHistory()])
    check_state_threading(student)
    report = start_report(student, plan, seed)
    fit = CalibrateOutputs(teacher, plan.fit or policy.fit, calibration, tokens, seed, progress, report, checkpoints)
    student = run_pipeline(student, [fit])
    if share:
        plan, student = keep_worst(teacher, student, plan, report, share)
    if plan.low_rank:
        _, data = look_at(teacher, policy, calibration, seed, Progress(progress))
        student = run_pipeline(student, [LowerRank(whitened_factors(teacher, plan.low_rank, data()))])
    student = run_pipeline(
        student, [DistillEndToEnd(teacher, whole, calibration, seed, progress, report, checkpoints)]
    )
    return finish(student, plan, report, captured.source_files)


def plan_sites(
    teacher: Program,
    recipe: Recipe,
    calibration: Iterable[torch.Tensor] | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Plan:
    """What a recipe makes of a program. Where its rules rank the sites, these are measured first, on `SCORE_TOKENS`
    tokens of the calibration data or of the teacher's own samples, unless the cache knows them.

    Raises:
        RecipeError: the model has no weights to measure, or a score is not defined for it.
    """
    wanted, scores = recipe.wanted_scores(), {}
    if not (wanted or recipe.searches) or not teacher.matched:
        return recipe.plan(teacher.matched, {score.name: {} for score in wanted})
    raised = teacher if _is_raised(teacher) else run_pipeline(teacher, [RaiseAttention()])
    bars = Progress(progress)
    key, data = look_at(raised, recipe, calibration, seed, bars)
    if wanted:
        scores = site_scores(raised, data, key, wanted, bars)
    return search_plan(raised, recipe, recipe.plan(raised.matched, scores), data, bars)


def look_at(
    teacher: Program, recipe: Recipe, calibration: Iterable[torch.Tensor] | None, seed: int, bars: Progress
) -> tuple[str, Callable[[], list[torch.Tensor]]]:
    """(a key of the data, the data) that is measured before anything is fitted: `SCORE_TOKENS` tokens."""
    fit = recipe.fit
    if calibration is None:
        key = f"own samples: {SCORE_TOKENS} tokens, rows of {fit.length}, {fit.batch} at a time, seed {seed}"
        return key, cache(lambda: _samples(teacher, recipe, seed, bars))
    given = split_rows(checked_batches(calibration, teacher.vocab_size, SCORE_TOKENS), fit.batch)
    return tokens_key(given), lambda: given


def _samples(teacher: Program, recipe: Recipe, seed: int, progress: Progress) -> list[torch.Tensor]:
    return split_rows(sample_teacher(teacher, SCORE_TOKENS, recipe.fit.length, seed, progress), recipe.fit.batch)


def _is_raised(program: Program) -> bool:
    return any(record.name == RaiseAttention.name for record in program.history)


def check_dynamic(program: Program) -> None:
    """One graph must serve prefill and decode, so batch and length are free.

    Raises:
        RewriteError: the program was captured at static sizes; it repeats why.
    """
    fixed = {"batch": program.fixed_batch, "length": program.fixed_length}
    static = " and ".join(f"{what} {size}" for what, size in fixed.items() if size is not None)
    if program.is_static:
        raise RewriteError(
            f"{program.model_name} could be captured at a static {static} only, where a model with a state needs any: "
            + "; ".join(note for note in program.notes if "static" in note)
        )


def check_sites(program: Program, recipe: Recipe) -> None:
    """There is something to rewrite, unless the recipe rewrites nothing.

    Raises:
        RewriteError: no attention was matched; it lists why, and what mixes tokens instead.
    """
    if program.matched or all(rule.mixer == "keep" for rule in recipe.rules):
        return
    why = [f"site {site.index} ({site.module}): {site.reason}" for site in program.refused]
    found = [*(why or ["no softmax was found"]), *read_carried(program)]
    raise RewriteError(
        f"{program.model_name} has no attention that could be matched: {'; '.join(found)}; "
        'recipe "none" compiles it as it is'
    )


def finish(student: Program, plan: Plan, report: Report, files: dict[str, bytes]) -> LinearizedModel:
    """Lower a rewritten and fitted program and wrap it."""
    lowered = run_pipeline(student, LOWER_PASSES)
    report.kernels = {node.name: node.meta["kernel"] for node in lowered.graph.nodes if "kernel" in node.meta}
    report.declined = {
        name: reason for node in lowered.graph.nodes for name, reason in node.meta.get("kernels_missing", ())
    }
    report.seconds = {record.name: round(record.seconds, 3) for record in lowered.history}
    return LinearizedModel(lowered, student, plan, report, files).eval()


def start_report(program: Program, plan: Plan, seed: int) -> Report:
    rows = [
        SiteReport(site=entry.site, module=entry.module, mixer=entry.label(), reason=entry.reason)
        for entry in plan.entries
    ]
    refused = [f"site {site.index} ({site.module}): {site.reason}" for site in program.refused]
    return Report(
        recipe=plan.recipe, seed=seed, processes=world(), sites=rows, refused=refused, notes=list(program.notes)
    )


def load(directory: str | Path) -> LinearizedModel:
    """Read what `LinearizedModel.save_pretrained` wrote. Nothing in the directory is executed.

    Raises:
        ArtifactError: it is not such a directory, or a file is missing, damaged or of an unknown version.
    """
    from linearize.runtime.saving import read

    return finish(*read(directory))


def inspect(model: nn.Module | ExportedProgram | Program, recipe: str | Path | Recipe | None = None) -> dict[str, Any]:
    """What `linearize inspect --json` prints: every attention of a model, matched or refused and why, and the plan."""
    return describe(capture(model), recipe)


def describe(program: Program, recipe: str | Path | Recipe | None = None) -> dict[str, Any]:
    """`inspect` for a program that is captured already."""
    plan = None
    if recipe is not None:
        policy = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
        plan = plan_sites(program, policy)
    return {
        "model": program.model_name,
        "captured_by": program.captured_by,
        "nodes": len(program.graph.nodes),
        "sites": [_describe_site(site, plan) for site in program.sites],
        "notes": [*program.notes, *read_carried(program)],
    }


def _describe_site(site: Site | NoMatch, plan: Plan | None) -> dict[str, Any]:
    spec = site.attention if isinstance(site, Site) else None
    return {
        "index": site.index,
        "module": site.module,
        "status": "matched" if site.matched else "refused",
        "reason": site.reason,
        "heads": spec.heads if spec else None,
        "kv_heads": spec.kv_heads if spec else None,
        "head_dim": spec.head_dim if spec else None,
        "mask": str(spec.mask) if spec else None,
        "extras": list(site.extras) if isinstance(site, Site) else [],
        "positions": site.positions if isinstance(site, Site) else None,
        "projections": [asdict(claim) for claim in site.projected] if isinstance(site, Site) else [],
        "plan": plan.entry(site.index).label() if plan and site.matched else None,
    }


def demo_model_dir() -> Path:
    """The embedded default: a small Llama-architecture model and its tokenizer, as a transformers directory."""
    return Path(__file__).parent / "demo_model"
