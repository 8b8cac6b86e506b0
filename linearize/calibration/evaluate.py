"""What a conversion lost, measured: perplexity, divergence from the teacher, recall by distance, MSE of every site.

A model is any function from token ids int64 [B, T] to next-token logits [B, T, V]; see `logits_of`. `rows` are batches
of token ids int64 [B, T] without padding, T >= 2. Sums are in float64 and weigh every predicted token alike.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from linearize.calibration.fit import output_error
from linearize.calibration.recall import RecallBatch, recall_hits
from linearize.calibration.teacher import TeacherStream
from linearize.errors import DataError
from linearize.mixers import Mixer, build_mixer
from linearize.plan import Plan
from linearize.program import MIXERS, Program
from linearize.rewriting.walk import attribute

Logits = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Agreement:
    """How close a student's predictions are to its teacher's, over `tokens` predictions.

    kl: mean KL(teacher || student) in nats. top1: share of predictions with the same most likely token.
    """

    kl: float
    top1: float
    tokens: int


@dataclass(frozen=True)
class Recall:
    """Top-1 accuracy where the answer stands `low` to `high` tokens back (both included), over `count` answers."""

    low: int
    high: int
    accuracy: float
    count: int


def logits_of(model: nn.Module) -> Logits:
    """A model with a transformers-like forward, or a compiled one, as a function of token ids alone."""

    def logits(input_ids: Tensor) -> Tensor:
        output = model(input_ids)
        return output if isinstance(output, Tensor) else output.logits

    return logits


@torch.no_grad()
def perplexity(model: Logits, rows: Iterable[Tensor]) -> float:
    """exp of the mean negative log-likelihood of every token but the first of each row.

    Raises:
        DataError: there is nothing to predict.
    """
    total, count = 0.0, 0
    for ids in rows:
        losses = nn.functional.cross_entropy(model(ids)[:, :-1].float().mT, ids[:, 1:], reduction="none")
        total, count = total + losses.double().sum().item(), count + losses.numel()
    return math.exp(total / _counted(count))


@torch.no_grad()
def agreement(teacher: Logits, student: Logits, rows: Iterable[Tensor]) -> Agreement:
    """Compare two models at every position of every row.

    Raises:
        DataError: there are no rows.
    """
    kl, same, count = 0.0, 0, 0
    for ids in rows:
        expected, actual = teacher(ids).float().log_softmax(-1), student(ids).float().log_softmax(-1)
        kl += (expected.exp() * (expected - actual)).double().sum().item()
        same += int((expected.argmax(-1) == actual.argmax(-1)).sum())
        count += ids.numel()
    return Agreement(kl / _counted(count), same / count, count)


def recall(model: Logits, batches: Iterable[RecallBatch], edges: Sequence[int]) -> list[Recall]:
    """Accuracy by the distance to look back, over all batches together.

    Args:
        edges: increasing lower bounds, the last one closing the last range: (33, 64, 128) gives 33..63 and 64..127.

    Returns:
        One entry for every range in which something could be recalled.
    """
    return recall_table([recall_hits(model, batch) for batch in batches], edges)


def recall_table(scored: Sequence[tuple[Tensor, Tensor]], edges: Sequence[int]) -> list[Recall]:
    """The same of what `recall_hits` gave."""
    if not scored:
        return []
    hits, distances = torch.cat([hit for hit, _ in scored]), torch.cat([distance for _, distance in scored])
    table = []
    for low, end in pairwise(edges):
        inside = (distances >= low) & (distances < end)
        if inside.any():
            table.append(Recall(low, end - 1, hits[inside].double().mean().item(), int(inside.sum())))
    return table


def overall(table: Sequence[Recall]) -> float:
    """Accuracy over all ranges of a recall table together; NaN for an empty one."""
    count = sum(row.count for row in table)
    return sum(row.accuracy * row.count for row in table) / count if count else math.nan


# ---- sites -----------------------------------------------------------------------------------------------------------


def site_errors(teacher: Program, mixers: Mapping[int, Mixer], rows: list[Tensor]) -> dict[int, float]:
    """Relative MSE of each mixer's output, each fed the teacher's own inputs: mean (y' - y)^2 / var(y).

    Args:
        teacher: a raised program (after `raise_attention`).
        mixers: by site; sites without one are passed over.
        rows: token ids int64 [B, T] to measure on.

    Raises:
        DataError: a teacher's output is not finite or does not vary on these rows.
    """
    stream = TeacherStream(teacher, rows)
    return {
        site.index: output_error(mixers[site.index], stream, site)
        for site in stream.walk(teacher.matched)
        if site.index in mixers
    }


def mixers_at_start(teacher: Program, plan: Plan) -> dict[int, Mixer]:
    """Fresh mixers for the matched sites as planned, before any fitting."""
    entries = {site.index: (site.attention, plan.entry(site.index)) for site in teacher.matched}
    return {
        index: build_mixer(entry.mixer, spec, entry.options).to(teacher.device)
        for index, (spec, entry) in entries.items()
    }


def mixers_of(program: Program) -> dict[int, Mixer]:
    """The mixers of a rewritten program, as they are now (`LinearizedModel.source` after a fit)."""
    return {site.index: attribute(program.module, f"{MIXERS}.{site.index}") for site in program.matched}


def _counted(count: int) -> int:
    if not count:
        raise DataError("there is no token to predict: the rows are empty or one token long")
    return count
