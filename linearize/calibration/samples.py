"""The teacher's own samples: text drawn from the model itself, so that fitting needs no data.

Every fourth row is a segment of its own sample over and over: a right continuation can then be found far back only,
so the far branch of a mixer must earn its place. Samples alone show too little of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.errors import DataError
from linearize.passes.lower import LOWER_PASSES
from linearize.passes.rewrite import CarryHistory, InsertMixers
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.program import Program
from linearize.progress import Progress
from linearize.report import Report
from linearize.runtime.generate import Sampling, choose
from linearize.runtime.model import LinearizedModel

ROWS_AT_ONCE = 128
REPEAT_EVERY = 4


def sample_teacher(teacher: Program, tokens: int, length: int, seed: int, progress: Progress) -> list[Tensor]:
    """int64 rows [B, length] drawn at temperature 1, `tokens` tokens or a few more; of a model that stays on disk
    `samples_from_disk` does it, in short pieces.

    Rows start from the source's `bos_token_id`; sources without one start from a random token.

    Raises:
        DataError: the vocabulary is unknown, so nothing can be drawn; pass calibration data.
    """
    if teacher.weights is not None:
        from linearize.calibration.samples_from_disk import sample_from_disk

        return sample_from_disk(teacher, tokens, length, seed, progress)
    vocabulary, plan = vocabulary_of(teacher), keep_all(teacher)
    program = with_cache(teacher)
    model = LinearizedModel(program, program, plan, Report(), {}).eval()
    length = sample_length(program, length)
    rows = max(8, -(-tokens // length))
    generator = torch.Generator(device=teacher.device).manual_seed(seed)
    start = first_tokens(teacher, rows, vocabulary, generator)
    batches = []
    with torch.no_grad():
        for part in progress.track(start.split(ROWS_AT_ONCE), "sampling the teacher"):
            batches.append(repeat_segments(_continue(model, part, length, generator, progress), generator))
    return batches


def repeat_segments(rows: Tensor, generator: torch.Generator) -> Tensor:
    """int64 [B, T], every fourth row replaced by a random segment of itself, T / 12 to T / 2 long, again and again
    behind its first token."""
    rows, length = rows.clone(), rows.shape[1]
    for row in rows[REPEAT_EVERY - 1 :: REPEAT_EVERY]:
        size = _draw(max(1, length // 12), max(2, length // 2), generator)
        start = _draw(0, max(1, length - size), generator)
        segment = row[start : start + size]
        row[1:] = segment.repeat(-(-(length - 1) // size))[: length - 1].clone()
    return rows


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    """Uniform on low .. high - 1."""
    return int(torch.randint(low, high, (1,), generator=generator, device=generator.device))


def vocabulary_of(teacher: Program) -> int:
    """
    Raises:
        DataError: it is unknown.
    """
    if teacher.vocab_size is None:
        raise DataError("the model embeds no token ids in a way that tells its vocabulary; pass calibration data")
    return teacher.vocab_size


def sample_length(program: Program, length: int) -> int:
    """The length of rows, where a model with a cache cannot take that many tokens: what it can."""
    return min(length, _limit(program) or length, program.max_positions or length)


def keep_all(teacher: Program) -> Plan:
    entries = [PlanEntry(site=site.index, module=site.module, mixer="keep") for site in teacher.matched]
    return Plan(recipe="none", entries=tuple(entries))


def with_cache(teacher: Program, lower: bool = True) -> Program:
    """The teacher itself, run with a key-value cache: the `keep` mixer at every site."""
    passes = [InsertMixers(keep_all(teacher)), CarryHistory(), *(LOWER_PASSES if lower else ())]
    return run_pipeline(teacher, passes)


def first_tokens(teacher: Program, rows: int, vocabulary: int, generator: torch.Generator) -> Tensor:
    bos: Any = (teacher.source_config or {}).get("bos_token_id")
    if isinstance(bos, int) and 0 <= bos < vocabulary:
        return torch.full((rows, 1), bos, dtype=torch.int64, device=teacher.place)
    return torch.randint(0, vocabulary, (rows, 1), generator=generator, device=teacher.place)


def _continue(
    model: LinearizedModel, tokens: Tensor, length: int, generator: torch.Generator, progress: Progress
) -> Tensor:
    sampling, state = Sampling(do_sample=True), None
    step = tokens
    for _ in progress.track(range(length - 1), "sampling the teacher"):
        if model.program.stateless_reason:
            logits = model(tokens).logits  # an attention without a cache: whole sequences each time
        else:
            logits, state = model.step(step, state)
        step = choose(logits[:, -1], sampling, generator)[:, None]
        tokens = torch.cat([tokens, step], dim=1)
    return tokens


def _limit(teacher: Program) -> int | None:
    """Longest context of the source, as its config says."""
    config = teacher.source_config or {}
    found = [config.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return next((int(value) for value in found if isinstance(value, int) and value > 1), None)
