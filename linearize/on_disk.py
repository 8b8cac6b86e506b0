"""compile_directory(): `compile` for a model that does not fit in memory, from directory to directory.

    capture on the meta device -> plan -> forecast -> fit block by block -> copy the weights, tensor by tensor

The result is what `compile` and `save_pretrained` write, to the last digits of rounding.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from linearize.api import SCORE_TOKENS, check_dynamic, check_sites, finish, plan_sites, start_report
from linearize.calibration.blocks import Blocks
from linearize.calibration.checkpoints import Checkpoints, forget
from linearize.calibration.data import checked_batches, split_rows
from linearize.calibration.forecast import check_fits, forecast
from linearize.calibration.limits import free_memory
from linearize.calibration.on_disk_distill import check_distill, tensors_of, with_distillation, with_fitted
from linearize.calibration.parallel import rank, wait
from linearize.calibration.samples import sample_length
from linearize.calibration.samples_from_disk import reads_text
from linearize.capture.on_disk import capture_directory, stored_tensors
from linearize.errors import RecipeError, RewriteError
from linearize.files import check_new_directory
from linearize.mixers import build_mixer
from linearize.passes.calibrate import CalibrateOutputs, DistillEndToEnd
from linearize.passes.calibrate.distill_end_to_end import projections_of
from linearize.passes.rewrite import CarryHistory, InsertMixers, RaiseAttention, keep_worst
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.program import Program
from linearize.recipe import Recipe
from linearize.runtime.model import LinearizedModel
from linearize.runtime.saving_from_disk import save_from_disk
from linearize.tensorfile import bytes_of, read_tensor
from linearize.verify import pieces_difference
from linearize.weights import give_memory_back

WHOLE, BESIDE = 2.2, 512 << 20  # memory of `compile`: the weights twice, as saving copies them; and everything else
PIECES = 1e-3
SpillTo = Literal["auto", "disk", "memory"]


def compile_directory(
    source: str | Path,
    output: str | Path,
    recipe: str | Path | Recipe = "auto",
    *,
    calibration: Iterable[Tensor] | None = None,
    plan: Plan | None = None,
    tokens: int | None = None,
    distill: int | None = None,
    seed: int = 0,
    progress: bool = True,
    memory: int | None = None,
    spill: SpillTo = "auto",
    work: str | Path | None = None,
    say: Callable[[str], None] | None = None,
) -> LinearizedModel:
    """Compile the transformers model in `source` into `output` with one block of it in memory at a time.

    Args:
        source: a directory with config.json and safetensors files; nothing in it is changed.
        output: the directory to write, as `LinearizedModel.save_pretrained` would; it appears complete or not at all.
        recipe, calibration, plan, tokens, distill, seed, progress: as for `linearize.compile`; without `calibration`
            the model's own samples are short pieces, because every step reads all of its weights.
        memory: bytes that this process may take; None for what the machine and its limits leave.
        spill: where activations between blocks are kept; "auto": in memory where they take less than half of it.
        work: a folder for finished layers and activations, on the disk of `output`; None takes `output` + ".fitting".
            The same call goes on from what it finds there; it is removed when all is written.
        say: gets the forecast in one line, before the work; None prints it to stderr.

    Returns:
        The compiled model without its weights: `report`, `plan` and `state_bytes` answer. `linearize.load(output)` for
        the weights.

    Raises:
        DataError: it cannot be done in this memory or on this disk, or the data is unusable.
        ArtifactError: no such model, or files that are not read in pieces. And what `compile` raises.
    """
    target = Path(output)
    check_new_directory(target)
    folder = Path(work) if work is not None else target.absolute().with_name(f"{target.absolute().name}.fitting")
    policy = recipe if isinstance(recipe, Recipe) else Recipe.load(recipe)
    if plan is not None and plan.fit is not None:
        policy = policy.model_copy(update={"fit": plan.fit})
    budget = policy.fit.tokens if tokens is None else tokens
    how = policy.distill if distill is None else policy.distill.model_copy(update={"tokens": distill})
    scored = plan is None and bool(policy.wanted_scores())
    check_possible(policy, plan)
    check_distill(how)
    captured = capture_directory(source)
    if captured.weights is not None:
        captured.weights.limit = memory
    check_dynamic(captured)
    check_sites(captured, policy)
    teacher = run_pipeline(captured, [RaiseAttention()])
    check_pieces(teacher)
    wanted = max(budget, SCORE_TOKENS if scored else 0, how.tokens)
    given = checked_batches(calibration, captured.vocab_size, wanted) if calibration is not None and wanted else []
    shapes = given if calibration is not None or not budget else [own_shape(captured, budget, policy.fit.length)]
    batches = split_rows(checked_batches(shapes, captured.vocab_size, budget), policy.fit.batch) if budget > 0 else []
    share = policy.keep_worst if plan is None else 0.0
    plan = plan or plan_sites(teacher, policy, given or None, seed, progress)
    plan.check([site.index for site in captured.matched])
    files = captured.source_files
    del captured
    gc.collect()
    give_memory_back()
    blocks = Blocks(teacher)
    found = forecast(teacher, plan, policy.fit, batches, blocks, memory, spill)
    found = with_distillation(found, teacher, plan, projections_of(teacher), how, blocks)
    (say or _print)(str(found))
    check_fits(found, memory, target.absolute().parent)
    if calibration is None and budget + how.tokens:
        (say or _print)(reads_text(teacher))
    student = run_pipeline(teacher, [InsertMixers(plan), CarryHistory()])
    report = start_report(student, plan, seed)
    data = _described(given, calibration) if calibration is not None else None
    fit = CalibrateOutputs(teacher, policy.fit, data, tokens, seed, progress, report, folder, not found.in_memory)
    kept = fit.checkpoints(student) if batches else Checkpoints(None, "")
    student = run_pipeline(student, [fit])
    if share:
        plan, student = keep_worst(teacher, student, plan, report, share)
    mixer_tensor = _mixer_tensors(teacher, plan, kept)
    if how.tokens:
        distil = DistillEndToEnd(teacher, how, data, seed, progress, report, folder)
        trained = run_pipeline(with_fitted(student, teacher, plan, kept), [distil])
        mixer_tensor, student = tensors_of(trained), student.replace(weights=trained.weights)
    model = finish(student, plan, report, files)
    if not rank():
        save_from_disk(model, target, mixer_tensor, (kept.folder or folder) / "result")
        if work is None:
            forget(folder)
    wait()
    return model


def check_possible(policy: Recipe, plan: Plan | None) -> None:
    """Refuse what needs the whole model in memory."""
    searched = sorted(policy.searches) if plan is None else ["low_rank"] * bool(plan.low_rank)
    if searched:
        raise RecipeError(
            f"{searched[0]} looks at the whole model in memory, which a model that stays on disk is not: compile it "
            "without streaming, or leave that out of the recipe or plan"
        )


def own_shape(program: Program, tokens: int, length: int) -> Tensor:
    """As many rows as the model's own samples will have, for the forecast."""
    length = sample_length(program, length)
    return torch.zeros(max(8, -(-tokens // length)), length, dtype=torch.int64)


def needs_streaming(source: str | Path) -> bool:
    """Whether `compile` would not have the memory for the model in this directory; False where that is not known."""
    with suppress(Exception):
        files = stored_tensors(Path(source))
        weights = sum(bytes_of(stored.dtype, stored.shape) for stored in files.values())
        return WHOLE * weights + BESIDE > free_memory()
    return False


def check_pieces(teacher: Program) -> None:
    """Nothing but its attentions mixes tokens, so that mixers' states are all the state there is.

    Raises:
        RewriteError: something else does, which would have to be carried along by value.
    """
    if teacher.refused:
        first = teacher.refused[0]
        raise RewriteError(
            f"site {first.index} ({first.module}) was not matched ({first.reason}); a model that stays on disk is "
            "compiled only where every attention is: compile it without streaming"
        )
    entries = tuple(PlanEntry(site=site.index, module=site.module, mixer="keep") for site in teacher.matched)
    program = run_pipeline(teacher, [InsertMixers(Plan(entries=entries))])
    worst, error = pieces_difference(program)
    if error is not None or worst > PIECES:
        raise RewriteError(
            f"{teacher.model_name} mixes tokens outside its attentions (in pieces it differs by {worst:.2g}), which is "
            "carried along only in memory: compile it without streaming"
        )


class _Batches(Sequence[Tensor]):
    """Token ids with the description of where they came from."""

    def __init__(self, batches: list[Tensor], description: str) -> None:
        self._batches, self.description = batches, description

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]
        return self._batches[index]


def _described(batches: list[Tensor], calibration: Iterable[Tensor] | None) -> Sequence[Tensor]:
    return _Batches(batches, getattr(calibration, "description", "given token ids"))


def _mixer_tensors(teacher: Program, plan: Plan, kept: Checkpoints) -> Callable[[int, str], Tensor]:
    """A tensor of a site's mixer: as it was fitted, or as it starts where it was not."""
    sites = {site.index: site for site in teacher.matched}

    def tensor(index: int, name: str) -> Tensor:
        entry = plan.entry(index)
        stored = kept.stored(index) if entry.mixer != "keep" else {}
        if name in stored:
            return read_tensor(stored[name])
        return build_mixer(entry.mixer, sites[index].attention, entry.options).state_dict()[name]

    return tensor


def _print(text: str) -> None:
    print(text, file=sys.stderr)
