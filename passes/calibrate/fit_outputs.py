"""Fit every mixer to its teacher by output MSE, site by site, on the teacher's own inputs."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from linearize.calibration.blocks import Blocks
from linearize.calibration.checkpoints import Checkpoints
from linearize.calibration.data import checked_batches, held_out_split, split_rows
from linearize.calibration.fit import fit_mixer
from linearize.calibration.keys import hash_of, model_key, tokens_key
from linearize.calibration.parallel import from_first, rank, share, told_by_first, wait, world
from linearize.calibration.samples import sample_teacher
from linearize.calibration.samples_from_disk import PIECE
from linearize.calibration.spill import Spill
from linearize.calibration.teacher import TeacherStream
from linearize.calibration.threads import threads_for
from linearize.mixers import Mixer, build_mixer
from linearize.pipeline import Keeps, Stage
from linearize.program import MIXERS, Program
from linearize.progress import Progress
from linearize.recipe import Fit
from linearize.report import Report, SiteReport
from linearize.rewriting.walk import attribute
from linearize.spec import Site


@dataclass(frozen=True)
class CalibrateOutputs:
    """Sites are independent: each is fed the teacher's inputs, so their order and number do not matter.

    Every eighth batch is held out; the errors in the report are measured on it alone. `tokens` = 0 leaves all mixers
    at their start and measures nothing. With `folder`, what is fitted is kept there site by site, and found
    again by the same call; with `spill` what the teacher hands from block to block is kept there too.

    Of a model that stays on disk the program holds mixers without values: each is made when its turn comes, and what
    was fitted is in `folder` alone.
    """

    teacher: Program
    fit: Fit
    calibration: Iterable[Tensor] | None
    tokens: int | None
    seed: int
    progress: bool
    report: Report
    folder: str | Path | None = None
    spill: bool = False

    name: ClassVar[str] = "calibrate_outputs"
    stage: ClassVar[Stage] = Stage.CALIBRATE
    keeps: ClassVar[Keeps] = Keeps.LOSSY

    def run(self, program: Program) -> Program:
        budget = self.fit.tokens if self.tokens is None else self.tokens
        mixers = _mixers(program)
        if budget <= 0:
            return program
        with threads_for(self.teacher):
            self._run(mixers, budget, program.max_positions)
        return program

    def _run(self, mixers: dict[int, Mixer], budget: int, longest: int | None) -> None:
        progress = Progress(self.progress)
        given = self._given(budget, longest)
        kept = self._checkpoints(mixers, given, budget)
        batches = given if given is not None else kept.samples(lambda: self._drawn(budget, progress))
        train, held = held_out_split(split_rows(batches, self.fit.batch))
        self.report.tokens_fitted = sum(batch.numel() for batch in train) * self.fit.passes
        self.report.tokens_held_out = sum(batch.numel() for batch in held)
        self._fit_all(train, held, mixers, kept, progress)

    def _given(self, budget: int, longest: int | None) -> list[Tensor] | None:
        self.report.data = (
            _own_samples(self.teacher)
            if self.calibration is None
            else getattr(self.calibration, "description", "given token ids")
        )
        if self.calibration is None:
            return None
        return checked_batches(self.calibration, self.teacher.vocab_size, budget, longest)

    def _drawn(self, budget: int, progress: Progress) -> list[Tensor]:
        return sample_teacher(self.teacher, budget, self.fit.length, self.seed, progress)

    def checkpoints(self, program: Program) -> Checkpoints:
        """Where what is fitted to given data is kept."""
        budget = self.fit.tokens if self.tokens is None else self.tokens
        return self._checkpoints(_mixers(program), self._given(budget, program.max_positions), budget)

    def _checkpoints(self, mixers: dict[int, Mixer], given: list[Tensor] | None, budget: int) -> Checkpoints:
        """Kept under all that the result depends on."""
        if self.folder is None:
            return Checkpoints(None, "")
        plan = [f"{index} {mixer.name} {sorted(mixer.options.items())}" for index, mixer in mixers.items()]
        data = tokens_key(given) if given is not None else f"own samples: {budget}"
        how = [self.fit.model_dump_json(), data, f"seed {self.seed}", f"torch {torch.__version__}"]
        how += [f"{world()} processes"] if world() > 1 else []  # which change what a gradient step sees
        key = hash_of(model_key(self.teacher), *plan, *how)
        return Checkpoints(self.folder, key)

    def _fit_all(
        self, train: list[Tensor], held: list[Tensor], mixers: dict[int, Mixer], kept: Checkpoints, progress: Progress
    ) -> None:
        sites, blocks = self.teacher.matched, Blocks(self.teacher)
        folder = kept.folder / "spill" if self.spill and kept.folder is not None else None
        parts = {"train": share(train, "fit on"), "held": held[rank() :: world()]}
        streams = [
            TeacherStream(self.teacher, parts[name], Spill(folder, f"{name}-{rank()}"), blocks).part_of(len(batches))
            for name, batches in (("train", train), ("held", held))
        ]
        rows = {row.site: row for row in self.report.sites}
        walks = zip(streams[0].walk(sites), streams[1].walk(sites), strict=True)
        for site, _ in progress.track(walks, "fitting sites", total=len(sites)):
            mixer, row = self._with_values(mixers[site.index], site), rows[site.index]
            if told_by_first(not rank() and kept.restore(mixer, row)):
                _take_over(mixer, row)
                continue
            fit_mixer(mixer, streams[0], streams[1], site, self.fit, row, progress)
            _take_over(mixer, row)
            if not rank():
                kept.keep(mixer, row)
        wait()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)

    def _with_values(self, mixer: Mixer, site: Site) -> Mixer:
        if self.teacher.weights is None:
            return mixer
        return build_mixer(mixer.name, site.attention, mixer.options).to(self.teacher.place)


def _own_samples(teacher: Program) -> str:
    return "the teacher's own samples" + (f", in pieces of {PIECE} tokens" if teacher.weights is not None else "")


def _mixers(program: Program) -> dict[int, Mixer]:
    return {site.index: attribute(program.module, f"{MIXERS}.{site.index}") for site in program.matched}


def _take_over(mixer: Mixer, row: SiteReport) -> None:
    """What the first process has."""
    from_first(mixer)
    for field, value in told_by_first(row.model_dump()).items():
        setattr(row, field, value)
