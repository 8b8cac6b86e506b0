"""The end-to-end stage as a pass: adapters or weights of its own, training, and one plain graph again."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor, nn

from linearize.calibration.checkpoints import Checkpoints
from linearize.calibration.data import checked_batches, held_out_split, split_rows
from linearize.calibration.end_to_end import EndToEnd, Group
from linearize.calibration.end_to_end_chain import Chain
from linearize.calibration.end_to_end_pair import Pair, mixers_in
from linearize.calibration.end_to_end_state import TrainingState
from linearize.calibration.keys import hash_of, model_key, tokens_key
from linearize.calibration.parallel import world
from linearize.calibration.samples import sample_teacher
from linearize.calibration.threads import threads_for
from linearize.distill import Distill
from linearize.mixers.linear_part import HeadMaps
from linearize.passes.calibrate.add_adapters import ADAPTERS, AddAdapters
from linearize.passes.calibrate.merge_adapters import MergeAdapters
from linearize.passes.calibrate.own_weights import OwnWeights
from linearize.pipeline import Keeps, Stage, run_pipeline
from linearize.program import Program
from linearize.progress import Progress
from linearize.report import Report

SLOW = 0.1  # of the learning rate, for what is near its best already: projections, maps that were solved for


@dataclass(frozen=True)
class DistillEndToEnd:
    """Nothing happens with `how.tokens` = 0. Without `calibration` the teacher's own samples are trained on, other ones
    than the layers were fitted on. The result is in `report.end_to_end`; with `folder` it is kept there on the way."""

    teacher: Program
    how: Distill
    calibration: Iterable[Tensor] | None
    seed: int
    progress: bool
    report: Report
    folder: str | Path | None = None

    name: ClassVar[str] = "distill_end_to_end"
    stage: ClassVar[Stage] = Stage.CALIBRATE
    keeps: ClassVar[Keeps] = Keeps.LOSSY

    def run(self, program: Program) -> Program:
        """
        Raises:
            RewriteError: the logits are no linear map of hidden states.
            DataError: the data is unusable, or a loss is not finite.
        """
        if self.how.tokens <= 0:
            return program
        Pair.of(self.teacher, program)  # refuses before anything is drawn
        bars = Progress(self.progress)
        draw, data = self._data(program, bars)
        key = hash_of(model_key(program), self.how.model_dump_json(exclude={"shard"}), data, f"seed {self.seed}")
        kept = Checkpoints(self.folder, key)
        train, held = held_out_split(split_rows(kept.samples(draw), self.how.batch))
        names = projections_of(program)
        prepared = self._prepared(program, names)
        with threads_for(self.teacher):
            pair = (Chain if self._in_pieces else Pair).of(self.teacher, prepared)
            run = EndToEnd(pair, self._groups(prepared, names), self.how, self.seed, TrainingState(kept))
            self.report.end_to_end = run.run(as_rows(train), held, bars)
        self._note()
        return prepared if self.how.full else run_pipeline(prepared, [MergeAdapters()])

    @property
    def _in_pieces(self) -> bool:
        return self.teacher.weights is not None or (world() > 1 and self.how.shard)

    def _data(self, program: Program, bars: Progress) -> tuple[Callable[[], list[Tensor]], str]:
        """(what gives the batches, their key)."""
        if self.calibration is not None:
            given = checked_batches(self.calibration, self.teacher.vocab_size, self.how.tokens, program.max_positions)
            return (lambda: given), tokens_key(given)
        length = max(self.how.lengths)
        wanted = self.how.tokens * 8 // 7  # an eighth is held out

        def draw() -> list[Tensor]:
            return sample_teacher(self.teacher, wanted, length, self.seed + 1, bars)

        return draw, f"own samples: {wanted} of {length}"

    def _prepared(self, program: Program, names: tuple[str, ...]) -> Program:
        if self.how.full:
            return run_pipeline(program, [OwnWeights(names)])
        return run_pipeline(program, [AddAdapters(names, self.how.rank, self.seed)])

    def _groups(self, program: Program, names: tuple[str, ...]) -> list[Group]:
        mixers, rate = nn.ModuleList(mixers_in(program).values()), self.how.learning_rate
        solved = {id(p) for module in mixers.modules() if isinstance(module, HeadMaps) for p in module.parameters()}
        moving = list(dict.fromkeys(mixers.parameters()))
        slow = [p for p in moving if id(p) in solved]
        fast = [p for p in moving if id(p) not in solved]
        if self.how.full:
            slow += [program.module.get_parameter(name) for name in names]
        else:
            fast += list(program.module.get_submodule(ADAPTERS).parameters())
        return [group for group in (Group(fast, rate), Group(slow, SLOW * rate)) if group.parameters]

    def _note(self) -> None:
        found = self.report.end_to_end
        if found is not None and not found.kept:
            self.report.notes.append(
                f"end to end: held-out KL did not fall in {found.steps} steps (from {found.kl_start:.4f}), so the "
                "weights from before it stay; more tokens or another learning rate may help"
            )


def projections_of(program: Program) -> tuple[str, ...]:
    """The matrices of the matched attentions' projections, each once."""
    names = (claim.parameter for site in program.matched for claim in site.projected)
    known = dict(program.module.named_parameters())
    return tuple(name for name in dict.fromkeys(names) if name in known and known[name].dim() == 2)


def as_rows(batches: list[Tensor]) -> Tensor:
    """int64 [N, T]: the rows that are long enough, cut to the length at which the most tokens are left."""
    lengths = {batch.shape[1] for batch in batches}
    left = {length: length * sum(len(batch) for batch in batches if batch.shape[1] >= length) for length in lengths}
    best = max(left, key=lambda length: (left[length], length))
    return torch.cat([batch[:, :best] for batch in batches if batch.shape[1] >= best])
