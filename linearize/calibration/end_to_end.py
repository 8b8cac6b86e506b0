"""Distillation of a whole model: hidden states and mixer outputs first, then KL to the teacher's logits.

    hidden:  mean over taps of  mean (x_s - x_t)^2 / var(x_t)          x the taps of `end_to_end_pair`
    kl:      mean KL(teacher || student) in nats a token, over chunks of the vocabulary (`chunked_kl`)

The student runs on its own inputs, unlike in the fit by site. Held-out KL is measured before, on the way and after, and
the weights with the lowest stay: if training did not help, those from before. Which windows are cut and which rows come
next depends on the seed and the step alone, so a run that goes on from a checkpoint ends as one that was not cut off.
Several processes (`parallel`) share the rows of each step and average their gradients.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linearize.calibration.chunked_kl import chunked_kl
from linearize.calibration.end_to_end_pair import Pair, cut_windows, training_only
from linearize.calibration.end_to_end_state import Progressed, TrainingState
from linearize.calibration.parallel import average_gradients, rank, summed_numbers, told_by_first, world
from linearize.distill import Distill
from linearize.errors import DataError
from linearize.progress import Progress
from linearize.report import EndToEndReport

LOOKS = 8  # at the held-out KL
SAVE_EVERY = 20  # steps
WARM = 0.05


class Step(NamedTuple):
    """One step of the plan: its loss, its context length and its rows [rows, length] of the data's long rows."""

    loss: str
    length: int
    rows: int


class Group(NamedTuple):
    """Parameters that move at one rate."""

    parameters: list[nn.Parameter]
    rate: float


def planned_steps(how: Distill, longest: int) -> list[Step]:
    """Stages in order, as steps of `batch` x the first length tokens; lengths beyond the data's rows are left out."""
    lengths = [length for length in how.lengths if length <= longest] or [longest]
    size = how.batch * lengths[0]
    count = max(1, math.ceil(how.tokens / size))
    hidden = round(how.hidden_share * count)
    steps = [Step("hidden", lengths[0], how.batch)] * hidden
    for index, length in enumerate(lengths):
        share = (count - hidden) * (index + 1) // len(lengths) - (count - hidden) * index // len(lengths)
        steps += [Step("kl", length, max(1, size // length))] * share
    return steps


def rows_of(data: Tensor, step: int, plan: list[Step]) -> Tensor:
    """int64 [rows, length]: the next tokens of data [N, T] at that step, from its begin again when it is used up."""
    at, (_, length, rows) = sum(one.rows * one.length for one in plan[:step]), plan[step]
    pieces = data.shape[1] // length
    first = at // length
    picked = [(first + offset) % (len(data) * pieces) for offset in range(rows)]
    return torch.stack([data[i // pieces, (i % pieces) * length : (i % pieces + 1) * length] for i in picked])


@dataclass
class EndToEnd:
    """One run. `groups` hold every parameter that may move; nothing else of the student or the teacher does."""

    pair: Pair
    groups: list[Group]
    how: Distill
    seed: int
    state: TrainingState

    def run(self, data: Tensor, held: list[Tensor], progress: Progress) -> EndToEndReport:
        """Train on rows int64 [N, T]; `held` are batches [B, T] that are never trained on.

        Raises:
            DataError: a loss is not finite.
        """
        started, plan = time.perf_counter(), planned_steps(self.how, data.shape[1])
        parameters = [p for group in self.groups for p in group.parameters]
        optimiser = torch.optim.AdamW(
            [{"params": group.parameters, "lr": group.rate, "rate": group.rate} for group in self.groups],
            weight_decay=0.0, betas=(0.9, 0.95),
        )  # fmt: skip
        modules = self.pair.student.program.module, self.pair.teacher.program.module
        with training_only(parameters, *modules):
            found = self.state.restore(parameters, optimiser)
            if told_by_first(found) != found:
                raise DataError("the processes do not see the same checkpoints; give them one folder")
            if found is None:
                start = self.held_out(held)
                found = Progressed(0, start, start)
                self.state.remember(parameters)
            found = self._train(found, plan, data, held, parameters, optimiser, progress)
        self.state.put_back(parameters)
        return EndToEndReport(
            tokens=sum(step.rows * step.length for step in plan), steps=len(plan), kl_start=found.start,
            kl_end=found.lowest, kept=found.lowest < found.start, parameters=sum(p.numel() for p in parameters),
            trained="projections" if self.how.full else "adapters", seconds=round(time.perf_counter() - started, 2),
        )  # fmt: skip

    def _train(
        self, found: Progressed, plan: list[Step], data: Tensor, held: list[Tensor],
        parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer, progress: Progress,
    ) -> Progressed:  # fmt: skip
        every = max(1, len(plan) // LOOKS)
        try:
            for step in progress.track(range(found.step, len(plan)), "distilling", total=len(plan) - found.step):
                self._one(step, plan, data, optimiser, progress)
                found = found._replace(step=step + 1)
                if (step + 1) % every == 0 or step + 1 == len(plan):
                    found = self._look(found, held, parameters)
                if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(plan):
                    self.state.keep(found, parameters, optimiser)
        except KeyboardInterrupt:
            self.state.keep(found, parameters, optimiser)
            raise
        return found

    def _one(
        self, step: int, plan: list[Step], data: Tensor, optimiser: torch.optim.Optimizer, progress: Progress
    ) -> None:
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * _factor(step, len(plan))
        ids = own_rows(rows_of(data, step, plan)).to(self.pair.student.program.device)
        if self._cuts(step):
            with cut_windows(self.pair.student.program):
                loss = self.loss(ids, plan[step].loss)
        else:
            loss = self.loss(ids, plan[step].loss)
        if not torch.isfinite(loss):
            raise DataError(f"distilling: the {plan[step].loss} loss is not finite at step {step}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(nn.ParameterList([p for group in self.groups for p in group.parameters]))
        torch.nn.utils.clip_grad_norm_([p for group in self.groups for p in group.parameters], 1.0)
        optimiser.step()
        progress.note(f"{plan[step].loss} {loss.item():.4f} at {plan[step].length}")

    def _cuts(self, step: int) -> bool:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return torch.rand((), generator=generator).item() < self.how.window_dropout

    def _look(self, found: Progressed, held: list[Tensor], parameters: list[nn.Parameter]) -> Progressed:
        error = self.held_out(held)
        if not error < found.lowest:
            return found
        self.state.remember(parameters)
        return found._replace(lowest=error)

    def loss(self, ids: Tensor, kind: str) -> Tensor:
        with torch.no_grad():
            expected = self.pair.teacher.values(ids)
        actual = self.pair.student.values(ids)
        if kind == "kl":
            return self._kl(actual[0], expected[0])
        errors = [
            (x.float() - y.float()).square().mean() / y.float().var().clamp_min(1e-12)
            for x, y in zip(actual, expected, strict=True)
        ]
        return torch.stack(errors).mean()

    def _kl(self, actual: Tensor, expected: Tensor) -> Tensor:
        heads = self.pair.student.head(), self.pair.teacher.head()
        return chunked_kl(actual.flatten(0, -2), expected.flatten(0, -2), *heads)

    @torch.no_grad()
    def held_out(self, held: list[Tensor]) -> float:
        """Mean KL in nats a token."""
        total, count = 0.0, 0.0
        for batch in held[rank() :: world()]:
            ids = batch.to(self.pair.student.program.device)
            total += self.loss(ids, "kl").double().item() * ids.numel()
            count += ids.numel()
        total, count = summed_numbers(total, count)
        return total / count


def own_rows(ids: Tensor) -> Tensor:
    """This process's rows of a step; all of them where they cannot be shared out evenly."""
    return ids[rank() :: world()] if len(ids) % world() == 0 else ids


def _factor(step: int, steps: int) -> float:
    """Linear over the first 5 % of the steps, then half a cosine to 5 %."""
    warm = max(1, int(steps * WARM))
    if step < warm:
        return (step + 1) / warm
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def steps_text(plan: list[Step]) -> Iterator[str]:
    """`12 steps of hidden at 512`, one line a stage."""
    for stage in dict.fromkeys(plan):
        yield f"{plan.count(stage)} steps of {stage.loss} at {stage.length}"
