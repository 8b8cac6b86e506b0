"""A planner for a model: rows to score and to measure on, candidates, scores, pins."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from linearize.calibration.data import checked_batches
from linearize.calibration.keys import hash_of, model_key, tokens_key
from linearize.calibration.samples import sample_teacher
from linearize.calibration.scores import cache_folder
from linearize.errors import DataError, RecipeError
from linearize.export.ways import Way
from linearize.mixers.share import sharing_problem
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.planner.budgets import parse_budget
from linearize.planner.candidates import Candidate, candidate, default_candidates
from linearize.planner.costs import base_cost
from linearize.planner.exports import check_model, taken, ways_of
from linearize.planner.found import FOUND, found_candidates
from linearize.planner.planning import Planner
from linearize.planner.ranks import Ranks, choose, rank_scores
from linearize.planner.scores import planner_scores
from linearize.planner.streamed import KeptSpill
from linearize.planner.streamed_memory import check_memory
from linearize.planner.target import Target
from linearize.program import Program
from linearize.progress import Progress
from linearize.spec import Site

TOKENS = 4096
LONGEST = 2048  # of a row that scores are measured on, unless the data has longer ones


@dataclass(frozen=True)
class Wishes:
    """What the user wants of a plan beside its budget. `pins`: by site, a mixer with options; `never`: mixers that no
    site becomes; `mixers`: those that may be used at all, () for all; `extra`: further candidates, with options;
    `exports`: ways of exporting (`linearize.export.ways`) that must all take the plan; `weights`: a budget of weight
    bytes (`80%` of the source's, `3GiB`) that weights of low rank keep to, '' leaves weights as they are."""

    pins: dict[int, tuple[str, dict[str, Any]]] = field(default_factory=dict)
    never: tuple[str, ...] = ()
    mixers: tuple[str, ...] = ()
    extra: tuple[tuple[str, dict[str, Any]], ...] = ()
    by_head: bool = True
    exports: tuple[str, ...] = ()
    weights: str = ""

    def wants(self, mixer: str) -> bool:
        """Whether it is among those that sites may become without being asked for."""
        return mixer not in self.never and (not self.mixers or mixer in self.mixers)


def make_planner(
    program: Program,
    context: int,
    target: Target,
    *,
    batch: int = 1,
    data: Iterable[Tensor] | None = None,
    tokens: int = TOKENS,
    length: int = LONGEST,
    wishes: Wishes | None = None,
    seed: int = 0,
    progress: bool = False,
    memory: int | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Planner:
    """Measure what is not remembered, and be ready to plan for any budget.

    `data` yields token ids int64 [B, T], of which every other row is held out to measure plans on; None draws the
    model's own samples. A program that `capture_directory` made stays on disk: its scores are to second order, from one
    walk there and back (`streamed`), in `memory` bytes at most, or what is free; `say` is told how much that takes.

    Raises:
        RecipeError: no attention was matched, a pin cannot be, the model has no weights, or nothing that is left can be
            exported as wished.
        ExportError: there is no such way of exporting.
        DataError: the data is unusable, or there is none for a model that stays on disk, or it needs more memory.
    """
    teacher = raised(program)
    if not teacher.matched:
        raise RecipeError(f"{program.model_name} has no attention that could be matched, so there is nothing to plan")
    wishes = wishes or Wishes()
    ways = ways_of(wishes.exports)
    check_model(teacher, ways)
    check_pins(teacher.matched, context, wishes, ways)
    shown = Progress(progress)
    rows = _rows(teacher, data, tokens, length, seed, shown)
    train, held = _split(rows)
    longest = max(row.shape[1] for row in train)
    kinds = [name for name in FOUND if wishes.wants(name)]
    key = tokens_key(train)
    walk = _walk_folder(teacher, key, seed)
    if walk is not None:
        check_memory(teacher, train, memory, say)
        kinds = [name for name in kinds if name != "share"]  # to look at others' caches reads their weights again
    spill = KeptSpill(walk, "plan") if walk is not None else None
    found = found_candidates(teacher, lambda: train, key, kinds, context, min(longest, context), shown, spill)
    candidates, left_out = _candidates(teacher.matched, context, min(longest, context), wishes, ways, found)
    scores = planner_scores(teacher, lambda: train, key, candidates, shown, seed, walk)
    if walk is not None:
        shutil.rmtree(walk, ignore_errors=True)
    pins = {site: candidate(mixer, options, context, longest) for site, (mixer, options) in wishes.pins.items()}
    return Planner(
        teacher, context, batch, candidates, scores, target, train, held, pins, wishes.by_head, ways, left_out,
        _ranks(teacher, wishes, train, key, shown),
    )  # fmt: skip


def _ranks(teacher: Program, wishes: Wishes, rows: Sequence[Tensor], key: str, progress: Progress) -> list[Ranks]:
    """Of every block, within the wished bytes of weights."""
    if not wishes.weights:
        return []
    source = base_cost(teacher).weight_bytes
    limit = parse_budget(wishes.weights, source)
    if limit.seconds:
        raise RecipeError(f"weights take bytes, not {wishes.weights!r}; write 80% or 3GiB")
    return choose(teacher, rank_scores(teacher, lambda: rows, key, progress), limit.limit, source)


def raised(program: Program) -> Program:
    done = any(record.name == RaiseAttention.name for record in program.history)
    return program if done else run_pipeline(program, [RaiseAttention()])


def _walk_folder(teacher: Program, data_key: str, seed: int) -> Path | None:
    """Where the walk through a model that stays on disk keeps what crosses its cuts; None for one in memory."""
    if teacher.weights is None:
        return None
    return cache_folder("planner") / f"{hash_of(model_key(teacher), data_key, f'walk {seed}')}.walk"


def _rows(
    teacher: Program, data: Iterable[Tensor] | None, tokens: int, length: int, seed: int, progress: Progress
) -> list[Tensor]:
    """[1, T] each: what scores are measured on, and as much again that is held out."""
    if data is None and teacher.weights is not None:
        raise DataError(
            "a model that stays on disk is not sampled: every token would read all of its weights; give text to score "
            "on (--data FILE, or data=...)"
        )
    if data is None:
        batches = sample_teacher(teacher, 2 * tokens, length, seed, progress)
    else:
        batches = checked_batches(data, teacher.vocab_size, 2 * tokens, teacher.max_positions)
    rows = [row for batch in batches for row in batch.split(1)]
    return rows[: max(2, -(-2 * tokens // rows[0].shape[1]))]


def _split(rows: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """(to score on, held out); of a single row the first and second half."""
    if len(rows) == 1:
        half = rows[0].shape[1] // 2
        return [rows[0][:, :half]], [rows[0][:, half:]]
    half = (len(rows) + 1) // 2
    return list(rows[:half]), list(rows[half:])


def _candidates(
    sites: Sequence[Site],
    context: int,
    length: int,
    wishes: Wishes,
    ways: Sequence[Way],
    more: Mapping[int, Sequence[Candidate]],
) -> tuple[dict[int, list[Candidate]], dict[str, tuple[str, ...]]]:
    """(by site what it may become, {why: the mixers that are left out as some way of exporting does not take them})."""
    found, left_out = dict[int, list[Candidate]](), dict[str, list[str]]()
    for site in sites:
        wanted = site_candidates(site, context, length, wishes, more.get(site.index, ()), sites)
        found[site.index], without = _exported(site, wanted, wishes, ways)
        for reason, mixers in without.items():
            left_out[reason] = list(dict.fromkeys([*left_out.get(reason, []), *mixers]))
    return found, {reason: tuple(mixers) for reason, mixers in left_out.items()}


def _exported(
    site: Site, wanted: Sequence[Candidate], wishes: Wishes, ways: Sequence[Way]
) -> tuple[list[Candidate], dict[str, list[str]]]:
    """(what all ways take, {why not: mixers})."""
    kept, without = taken(site, wanted, ways)
    if kept:
        return kept, without
    what = "the pin" if site.index in wishes.pins else "every candidate"
    names = ", ".join(way.name for way in ways)
    raise RecipeError(
        f"site {site.index} ({site.module}): {what} is refused by an export that is wished for ({names}): "
        f"{next(iter(without))}; pin, use or add another mixer, or leave that export out"
    )


def check_pins(sites: Sequence[Site], context: int, wishes: Wishes, ways: Sequence[Way]) -> None:
    """Raises RecipeError where a pin cannot be, before anything is sampled or measured."""
    for site in sites:
        if site.index in wishes.pins:
            _exported(site, site_candidates(site, context, context, wishes, (), sites), wishes, ways)


def site_candidates(
    site: Site,
    context: int,
    length: int,
    wishes: Wishes,
    more: Sequence[Candidate] = (),
    sites: Sequence[Site] = (),
) -> list[Candidate]:
    """What a site may become, by what its mixers refuse and what the user wishes; `keep` is always among them unless it
    is pinned to something else. `more` was found on data; `sites` are all of the model, whose caches may be read.

    Raises:
        RecipeError: a pin is refused by the site or has wrong options.
    """
    pin = wishes.pins.get(site.index)
    if pin is not None:
        pinned = candidate(*pin, context, length)
        _check_pin(site, pinned, sites, wishes)
        return [pinned]
    found = [one for one in [*_by_mask(site, context, length), *more] if one.mixer == "keep" or wishes.wants(one.mixer)]
    found = [one for one in found if one.mixer not in wishes.never]
    found += [candidate(*one, context, length) for one in wishes.extra]
    found = [one for one in found if one.refusal(site) is None and sharing_refusal(site, one, sites, wishes) is None]
    if not found:
        raise RecipeError(f"site {site.index} ({site.module}): every candidate is refused or ruled out")
    return found


def sharing_refusal(site: Site, one: Candidate, sites: Sequence[Site], wishes: Wishes) -> str | None:
    """Why it cannot read the other site's cache, which must be one that may be kept; None for what reads none."""
    if one.of is None:
        return None
    source = next((other for other in sites if other.index == one.of), None)
    planned = wishes.pins.get(one.of, ("keep", {}))[0]
    if planned == "keep" and "keep" in wishes.never:
        return f"it shares the cache of site {one.of}, which is never kept"
    return sharing_problem(site, source, planned)


def _by_mask(site: Site, context: int, length: int) -> list[Candidate]:
    """A source's own sliding window is exact in a ring of its size, and nothing may look further back than it."""
    mask = site.attention.mask
    if mask.kind != "sliding":
        return default_candidates(context, length, site.attention.head_dim)
    sizes = sorted({max(1, mask.size // share) for share in (8, 4, 2, 1)})
    windows = [Candidate("window", (("window", size),), (("window", size),)) for size in sizes]
    return [Candidate("drop"), *windows, Candidate("keep")]


def _check_pin(site: Site, pinned: Candidate, sites: Sequence[Site], wishes: Wishes) -> None:
    try:
        refusal = pinned.refusal(site) or sharing_refusal(site, pinned, sites, wishes)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"pin of site {site.index}: {pinned.mixer}: {error}") from error
    if refusal is not None:
        raise RecipeError(f"pin of site {site.index} ({site.module}): {refusal}")
