"""What fitting a model from disk will take, told before it starts: memory, disk, time.

    memory = the process now + weights of the largest block (and one tensor more, while it is read)
             + activations of one batch in that block + what fitting one site takes beside them
             + one shard of the spill and one batch of it + token ids
    disk   = 2 cuts (where not in memory) + fitted mixers twice (kept, and in the result) + the result's weights
    time   = sites x (teacher's block on every batch, and fitting), from one trial of each

What fitting takes is tried: each kind of mixer is fitted to three batches of random numbers. Nothing here grows with
the number of layers, and with that of the tokens only their ids, 8 bytes each.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from linearize.calibration.blocks import Blocks, all_parameters, parameter_bytes, shape_at
from linearize.calibration.fit import fit_mixer
from linearize.calibration.limits import free_disk, free_memory, peak_memory, reset_peak, used_memory
from linearize.calibration.spill import SHARD
from linearize.errors import DataError
from linearize.mixers import Mixer, build_mixer
from linearize.plan import Plan, PlanEntry
from linearize.printing import bytes_text
from linearize.program import Program
from linearize.progress import Progress
from linearize.recipe import Fit
from linearize.report import SiteReport
from linearize.spec import Site
from linearize.weights import give_memory_back

MARGIN, SLACK = 1.1, 48 << 20  # of what is estimated; and for what is not: the allocator's gaps, the printing
SAMPLE = 512


@dataclass(frozen=True)
class Forecast:
    """Bytes and seconds. `memory` includes what the process has now, `taken`; `spill` is what all of a cut takes."""

    memory: int
    disk: int
    seconds: float
    taken: int
    block: int
    spill: int
    in_memory: bool

    def __str__(self) -> str:
        where = "in memory" if self.in_memory else "on disk"
        return (
            f"needs about {bytes_text(self.memory)} of memory ({bytes_text(self.taken)} of it taken already, largest "
            f"block {bytes_text(self.block)}), {bytes_text(self.disk)} of disk, {_time_text(self.seconds)}; "
            f"between blocks {bytes_text(self.spill)} are kept {where}"
        )


def forecast(
    teacher: Program, plan: Plan, fit: Fit, batches: Sequence[Tensor], blocks: Blocks, memory: int | None, spill: str
) -> Forecast:
    """For fitting `plan` to these batches int64 [B, T]; none: only what writing takes.

    Raises:
        DataError: `memory`, or what is free, is less than one block and its batch.
    """
    taken, limit = used_memory(), _limit(memory)
    names = [blocks.parameters(cut) for cut in range(len(blocks.crossing))]
    block = max((parameter_bytes(teacher, some) for some in names), default=0)
    largest = max((parameter_bytes(teacher, [name]) for name in all_parameters(teacher)), default=0)
    mixers = _mixer_bytes(teacher, plan)
    result = parameter_bytes(teacher, all_parameters(teacher)) + mixers
    if not batches:
        return Forecast(int((taken + 2 * largest) * MARGIN) + SLACK, result, result / 5e8, taken, block, 0, True)
    rows, length = max(batch.shape[0] for batch in batches), max(batch.shape[1] for batch in batches)
    working = max(blocks.working_bytes(cut, rows, length) for cut in range(len(blocks.crossing) - 1 or 1))
    width = max(blocks.width(cut, rows, length) for cut in range(len(blocks.crossing)))
    ids = 8 * sum(batch.numel() for batch in batches)
    before = taken + block + largest + working + ids
    if before > limit:
        raise DataError(_too_large(before, limit, block, working))
    trial, seconds = _trials(teacher, plan, fit, rows, length)
    least = int((before + trial + min(SHARD, width * len(batches)) + 2 * width - taken) * MARGIN) + SLACK + taken
    kept = 2 * width * len(batches)
    in_memory = spill == "memory" or (spill == "auto" and least + kept <= taken + (limit - taken) // 2)
    tokens = sum(batch.numel() for batch in batches)
    share = len(batches) / 3
    total = block_seconds(teacher, tokens) + sum(seconds[_kind(teacher, entry)] for entry in plan.entries) * share
    disk = result + mixers + (0 if in_memory else kept)
    return Forecast(least + (kept if in_memory else 0), disk, total, taken, block, kept // 2, in_memory)


def check_fits(found: Forecast, memory: int | None, folder: Path) -> None:
    """Refuse before the work what cannot be done.

    Raises:
        DataError: memory or disk is short; it says how much, and what helps.
    """
    if found.memory > _limit(memory):
        helps = "smaller batches or rows (the recipe's fit.batch, fit.length), a mixer with less state, more memory"
        raise DataError(f"fitting {found}, and there are {bytes_text(_limit(memory))}; what helps: {helps}")
    if found.disk > free_disk(folder):
        raise DataError(
            f"fitting {found}, and {folder} has {bytes_text(free_disk(folder))} of disk free; write to another disk, "
            "or fit on fewer tokens"
        )


def _limit(memory: int | None) -> int:
    """Of the whole process."""
    free = used_memory() + free_memory()
    return free if memory is None else min(memory, free)


def _too_large(before: int, limit: int, block: int, working: int) -> str:
    return (
        f"one block of the model needs {bytes_text(before)} of memory (weights {bytes_text(block)}, activations of one "
        f"batch {bytes_text(working)}), and there are {bytes_text(limit)}; fit on smaller batches or shorter rows (the "
        "recipe's fit.batch, fit.length), or give it more memory"
    )


def _kind(teacher: Program, entry: PlanEntry) -> str:
    site = next(site for site in teacher.matched if site.index == entry.site)
    return f"{entry.label()} {site.attention}"


def _mixer_bytes(teacher: Program, plan: Plan) -> int:
    """Of all mixers' parameters and buffers, one built of each kind."""
    sizes: dict[str, int] = {}
    for entry in plan.entries:
        kind = _kind(teacher, entry)
        if kind not in sizes:
            tensors = _build(teacher, entry)[0].state_dict().values()
            sizes[kind] = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    return sum(sizes[_kind(teacher, entry)] for entry in plan.entries)


def _build(teacher: Program, entry: PlanEntry) -> tuple[Mixer, Site]:
    site = next(site for site in teacher.matched if site.index == entry.site)
    return build_mixer(entry.mixer, site.attention, entry.options).to(teacher.place), site


class _RandomStream:
    """Stands for a `TeacherStream`: random numbers of a site's shapes."""

    def __init__(self, teacher: Program, site: Site, batches: list[Tensor]) -> None:
        self.program, self.site, self.batches = teacher, site, batches
        self.total, self.step = len(batches), 1

    def place(self, batch: int) -> int:
        return batch

    def site_values(self, site: Site, needs: tuple[str, ...], batch: int) -> tuple[list[Tensor], Tensor]:
        names = [site.nodes.query, site.nodes.key, site.nodes.value, *(getattr(site.nodes, need) for need in needs)]
        *inputs, output = self.values([*names, site.nodes.core], batch)
        return inputs, output

    def values(self, names: list[str], batch: int) -> list[Tensor]:
        rows, length = self.batches[batch].shape
        generator = torch.Generator().manual_seed(batch)
        nodes = [self.program.node(name) for name in names]
        shapes = [shape_at(self.program, node, rows, length) for node in nodes]
        made = [torch.randn(shape, generator=generator) for shape in shapes]
        return [one.to(self.program.place, node.meta["val"].dtype) for one, node in zip(made, nodes, strict=True)]


def _trials(teacher: Program, plan: Plan, fit: Fit, rows: int, length: int) -> tuple[int, dict[str, float]]:
    """(bytes of the largest, seconds by kind of mixer) of fitting to three batches of random numbers."""
    most, seconds = 0, dict[str, float]()
    for entry in plan.entries:
        kind = _kind(teacher, entry)
        if kind in seconds:
            continue
        give_memory_back()
        reset_peak()
        before, started = used_memory(), time.perf_counter()
        mixer, site = _build(teacher, entry)
        data = [torch.zeros(rows, length, dtype=torch.int64) for _ in range(3)]
        train, held = (_RandomStream(teacher, site, some) for some in (data[:2], data[2:]))
        row = SiteReport(site=site.index, module=site.module, mixer=entry.mixer)
        fit_mixer(mixer, train, held, site, fit, row, Progress(False))  # type: ignore[arg-type]
        most = max(most, peak_memory() - before)
        seconds[kind] = time.perf_counter() - started
        del mixer
    return most, seconds


def block_seconds(teacher: Program, tokens: int) -> float:
    """Of the teacher's products on all tokens, thrice each (to move on, and to fit twice), by the speed of one."""
    left, right = torch.randn(SAMPLE, SAMPLE), torch.randn(SAMPLE, SAMPLE)
    left @ right
    started = time.perf_counter()
    left @ right
    each = time.perf_counter() - started
    numbers = sum(_numel(teacher, name) for name in set(all_parameters(teacher)))
    return 3 * numbers * tokens / SAMPLE**3 * each


def _numel(teacher: Program, name: str) -> int:
    if teacher.weights is not None and name in teacher.weights.stored:
        return math.prod(teacher.weights.stored[name].shape)
    return 0


def _time_text(seconds: float) -> str:
    if seconds < 90:
        return f"about {max(1, round(seconds))} s"
    return f"about {seconds / 60:.0f} min" if seconds < 5400 else f"about {seconds / 3600:.1f} h"
