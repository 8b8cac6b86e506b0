"""Distillation of a whole model: hidden states and mixer outputs first, then KL to the teacher's logits.

    hidden:  mean over taps of  mean (x_s - x_t)^2 / var(x_t)          x the taps of `end_to_end_pair`
    kl:      mean KL(teacher || student) in nats a token, over chunks of the vocabulary (`chunked_kl`)

The student runs on its own inputs, unlike in the fit by site. Held-out KL is measured before, on the way and after, and
the weights with the lowest stay: if training did not help, those from before. Which windows are cut and which rows come
next depends on the seed and the step alone, so a run that goes on from a checkpoint ends as one that was not cut off.

Several processes share out the rows of each step: the loss is that of all rows, so that they take the steps of one
process; each keeps its part of what is trained (`sharding`), or all of it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linearize.calibration.chunked_kl import chunked_kl
from linearize.calibration.end_to_end_pair import Pair, cut_windows, training_only
from linearize.calibration.end_to_end_state import Progressed, TrainingState
from linearize.calibration.parallel import average_gradients, rank, summed, summed_numbers, told_by_first, world
from linearize.calibration.sharding import clip_gradients, is_sharded
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
        moving = [p for group in self.groups for p in group.parameters]
        modules = self.pair.student.program.module, self.pair.teacher.program.module
        with training_only(moving, *modules), self.pair.shared_out(self.how.shard) as stands:
            groups = [Group([stands.get(p, p) for p in group.parameters], group.rate) for group in self.groups]
            parameters = [p for group in groups for p in group.parameters]
            optimiser = torch.optim.AdamW(
                [{"params": group.parameters, "lr": group.rate, "rate": group.rate} for group in groups],
                weight_decay=0.0, betas=(0.9, 0.95),
            )  # fmt: skip
            found = self._begin(held, parameters, optimiser)
            found = self._train(found, plan, data, held, parameters, optimiser, progress)
            self.state.put_back(parameters)
        return EndToEndReport(
            tokens=sum(step.rows * step.length for step in plan), steps=len(plan), kl_start=found.start,
            kl_end=found.lowest, kept=found.lowest < found.start, parameters=sum(p.numel() for p in moving),
            trained="projections" if self.how.full else "adapters", seconds=round(time.perf_counter() - started, 2),
        )  # fmt: skip

    def _begin(
        self, held: list[Tensor], parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer
    ) -> Progressed:
        """From a checkpoint, or from the start."""
        found = self.state.restore(parameters, optimiser)
        if told_by_first(found) != found:
            raise DataError("the processes do not see the same checkpoints; give them one folder")
        if found is None:
            start = self.held_out(held)
            found = Progressed(0, start, start)
            self.state.remember(parameters)
        return found

    def _train(
        self, found: Progressed, plan: list[Step], data: Tensor, held: list[Tensor],
        parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer, progress: Progress,
    ) -> Progressed:  # fmt: skip
        every = max(1, len(plan) // LOOKS)
        try:
            for step in progress.track(range(found.step, len(plan)), "distilling", total=len(plan) - found.step):
                self._one(step, plan, data, parameters, optimiser, progress)
                found = found._replace(step=step + 1)
                if (step + 1) % every == 0 or step + 1 == len(plan):
                    found = self._look(found, held, parameters)
                if (step + 1) % SAVE_EVERY == 0 or step + 1 == len(plan):
                    self.state.keep(found, parameters, optimiser)
        except KeyboardInterrupt:
            if world() == 1:  # others may stand elsewhere, and wait for this one
                self.state.keep(found, parameters, optimiser)
            raise
        return found

    def _one(
        self, step: int, plan: list[Step], data: Tensor, parameters: list[nn.Parameter],
        optimiser: torch.optim.Optimizer, progress: Progress,
    ) -> None:  # fmt: skip
        for group in optimiser.param_groups:
            group["lr"] = group["rate"] * _factor(step, len(plan))
        rows = rows_of(data, step, plan)
        ids, share = own_rows(rows)
        optimiser.zero_grad(set_to_none=True)
        with cut_windows(self.pair.student.program) if self._cuts(step) else nullcontext():
            loss = self.loss(ids.to(self.pair.student.program.place), plan[step].loss, share) * share
            (value,) = summed_numbers(loss.item())
            if not math.isfinite(value):
                raise DataError(f"distilling: the {plan[step].loss} loss is not finite at step {step}")
            (loss * world()).backward()  # gradients are averaged
        average_gradients([p for p in parameters if not is_sharded(p)])
        clip_gradients(parameters, 1.0)
        optimiser.step()
        progress.note(f"{plan[step].loss} {value:.4f} at {plan[step].length}")

    def _cuts(self, step: int) -> bool:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + step)
        return torch.rand((), generator=generator).item() < self.how.window_dropout

    def _look(self, found: Progressed, held: list[Tensor], parameters: list[nn.Parameter]) -> Progressed:
        error = self.held_out(held)
        if not error < found.lowest:
            return found
        self.state.remember(parameters)
        return found._replace(lowest=error)

    def loss(self, ids: Tensor, kind: str, share: float = 1.0) -> Tensor:
        """Of this process's rows, which are `share` of all."""
        actual, expected = self.pair.values(ids)
        if kind == "kl":
            return chunked_kl(actual[0].flatten(0, -2), expected[0].flatten(0, -2), *self.pair.heads())
        spread = variances(expected, share)
        errors = [
            (x.float() - y.float()).square().mean() / variance
            for x, y, variance in zip(actual, expected, spread, strict=True)
        ]
        return torch.stack(errors).mean()

    @torch.no_grad()
    def held_out(self, held: list[Tensor]) -> float:
        """Mean KL in nats a token."""
        total, count = 0.0, 0.0
        for first in range(0, len(held), world()):  # all processes run as often
            own = first + rank()
            ids = held[min(own, len(held) - 1)].to(self.pair.student.program.place)
            tokens = ids.numel() if own < len(held) else 0
            total += self.loss(ids, "kl").double().item() * tokens
            count += tokens
        total, count = summed_numbers(total, count)
        return total / count


def own_rows(ids: Tensor) -> tuple[Tensor, float]:
    """(this process's rows of a step, their share of all); a process that has none runs one all the same, because the
    others wait for it, and counts it as nothing."""
    own = ids[rank() :: world()]
    return (own, len(own) / len(ids)) if len(own) else (ids[:1], 0.0)


def variances(values: list[Tensor], share: float) -> list[Tensor]:
    """Of each tensor, over all processes' parts, of which this one's are counted where `share` is above zero."""
    if world() == 1:
        return [value.float().var().clamp_min(1e-12) for value in values]
    counted = 1.0 if share > 0 else 0.0
    flat = [value.flatten().double() for value in values]
    sums = [counted * torch.stack([x.new_tensor(float(x.numel())), x.sum(), x.square().sum()]) for x in flat]
    count, first, second = summed([torch.stack(sums)])[0].unbind(1)
    found = (second - first.square() / count) / (count - 1)
    return list(found.clamp_min(1e-12).float())


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
