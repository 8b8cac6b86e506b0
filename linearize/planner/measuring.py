"""What plans lose: the KL of the model with all its mixers in place, on rows of any."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linearize.calibration.low_rank import whitened_factors
from linearize.calibration.teacher import TeacherStream
from linearize.mixers import Mixer
from linearize.plan import LowRankEntry, PlanEntry
from linearize.planner.ranks import thin_weights
from linearize.planner.scores import prepared
from linearize.planner.student import Student, losses_of, losses_streamed
from linearize.program import Program


@torch.no_grad()
def measured_rows(
    teacher: Program, train: Sequence[Tensor], held: Sequence[Tensor], plans: Sequence[Sequence[PlanEntry]],
    low_rank: Sequence[LowRankEntry] = (),
) -> list[list[float]]:  # fmt: skip
    """Mean KL(teacher || plan) in nats a token, of every plan on every batch of `held`, mixers and weights of low
    rank prepared on `train`. The teacher's own distribution is computed once a batch, and each mixer is made once for
    all plans."""
    stream = TeacherStream(teacher, list(train))
    made: dict[tuple[int, str], Mixer] = {}
    for site in stream.walk(teacher.matched):
        for entry in (one for plan in plans for one in plan if one.site == site.index and one.mixer != "keep"):
            if (site.index, entry.label()) not in made:
                made[site.index, entry.label()] = prepared(stream, site, entry.mixer, entry.options)
    used = [{e.site: made[e.site, e.label()] for e in plan if e.mixer != "keep"} for plan in plans]
    if teacher.weights is not None:
        return losses_streamed(Student(teacher), held, used)
    thin = thin_weights(teacher, low_rank, whitened_factors(teacher, low_rank, list(train))) if low_rank else None
    return losses_of(Student(teacher), held, used, thin)


def measured(
    teacher: Program, train: Sequence[Tensor], held: Sequence[Tensor], plans: Sequence[Sequence[PlanEntry]],
    low_rank: Sequence[LowRankEntry] = (),
) -> list[float]:  # fmt: skip
    """The means over rows of equal length."""
    return [sum(rows) / len(rows) for rows in measured_rows(teacher, train, held, plans, low_rank)]
