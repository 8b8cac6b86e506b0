"""Fit every mixer to its teacher by output MSE, site by site, on the teacher's own inputs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from linearize.calibration.data import checked_batches, held_out_split, split_rows
from linearize.calibration.fit import fit_mixer
from linearize.calibration.samples import sample_teacher
from linearize.calibration.teacher import TeacherStream
from linearize.calibration.threads import threads_for
from linearize.mixers import Mixer
from linearize.pipeline import Keeps, Stage
from linearize.program import MIXERS, Program
from linearize.progress import Progress
from linearize.recipe import Fit
from linearize.report import Report
from linearize.rewriting.walk import attribute


@dataclass(frozen=True)
class CalibrateOutputs:
    """Sites are independent: each is fed the teacher's inputs, so their order and number do not matter.

    Every eighth batch is held out; the errors in the report are measured on it alone. `tokens` = 0 leaves all mixers
    at their start and measures nothing.
    """

    teacher: Program
    fit: Fit
    calibration: Iterable[Tensor] | None
    tokens: int | None
    seed: int
    progress: bool
    report: Report

    name: ClassVar[str] = "calibrate_outputs"
    stage: ClassVar[Stage] = Stage.CALIBRATE
    keeps: ClassVar[Keeps] = Keeps.LOSSY

    def run(self, program: Program) -> Program:
        budget = self.fit.tokens if self.tokens is None else self.tokens
        mixers = {site.index: attribute(program.module, f"{MIXERS}.{site.index}") for site in program.matched}
        if budget <= 0:
            return program
        with threads_for(self.teacher):
            self._run(mixers, budget, program.max_positions)
        return program

    def _run(self, mixers: dict[int, Mixer], budget: int, longest: int | None) -> None:
        progress = Progress(self.progress)
        train, held = held_out_split(self._batches(budget, longest, progress))
        self.report.tokens_fitted = sum(batch.numel() for batch in train) * self.fit.passes
        self.report.tokens_held_out = sum(batch.numel() for batch in held)
        self._fit_all(train, held, mixers, progress)

    def _batches(self, budget: int, longest: int | None, progress: Progress) -> list[Tensor]:
        if self.calibration is not None:
            self.report.data = "given token ids"
            batches = checked_batches(self.calibration, self.teacher.vocab_size, budget, longest)
        else:
            self.report.data = "the teacher's own samples"
            batches = sample_teacher(self.teacher, budget, self.fit.length, self.seed, progress)
        return split_rows(batches, self.fit.batch)

    def _fit_all(self, train: list[Tensor], held: list[Tensor], mixers: dict[int, Mixer], progress: Progress) -> None:
        sites = self.teacher.matched
        streams = TeacherStream(self.teacher, train), TeacherStream(self.teacher, held)
        rows = {row.site: row for row in self.report.sites}
        walks = zip(streams[0].walk(sites), streams[1].walk(sites), strict=True)
        for site, _ in progress.track(walks, "fitting sites", total=len(sites)):
            fit_mixer(mixers[site.index], *streams, site, self.fit, rows[site.index], progress)
