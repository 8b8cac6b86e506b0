"""The samples of a model that stays on disk: many short pieces at once, joined to rows.

A step reads all weights once, whatever the number of rows, so `n` rows of `T` tokens cost T - 1 reads where all of them
fit beside the weights with their keys and values. Short pieces, each from its own beginning, are therefore what can be
had: pieces of 64 tokens take 63 reads, where rows of 512 took 511; what a fit to them is worth is in
docs/calibration.md. Every token has a random number of its own, drawn before (u of F(x) >= u, F the cumulative
distribution), so that how many pieces run at once does not change what is drawn.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.calibration.blocks import all_parameters, parameter_bytes
from linearize.calibration.limits import free_memory, used_memory
from linearize.calibration.parallel import told_by_first
from linearize.calibration.samples import first_tokens, repeat_segments, sample_length, vocabulary_of, with_cache
from linearize.printing import bytes_text
from linearize.program import MASK, POSITIONS, TOKENS, Program
from linearize.progress import Progress
from linearize.rewriting.walk import evaluate

PIECE = 64
SHARE = 0.25  # of the memory that is free: for keys, values and logits of the pieces that run at once
LOGITS = 4  # tensors of [rows, V] in float32


def sample_from_disk(teacher: Program, tokens: int, length: int, seed: int, progress: Progress) -> list[Tensor]:
    """int64 rows [B, length] drawn at temperature 1, `tokens` tokens or a few more, in pieces of at most `PIECE`; every
    fourth row is a segment of itself again and again (`samples.repeat_segments`).

    Raises:
        DataError: the vocabulary is unknown.
    """
    vocabulary, program = vocabulary_of(teacher), with_cache(teacher, lower=False)
    length = sample_length(program, length)
    rows, size = max(8, -(-tokens // length)), min(PIECE, length)
    each = -(-length // size)
    generator = torch.Generator(device=teacher.place).manual_seed(seed)
    first = first_tokens(teacher, rows * each, vocabulary, generator)
    chance = torch.rand(rows * each, size - 1, generator=generator, device=teacher.place)
    count = told_by_first(at_once(program, size, vocabulary))
    parts = zip(first.split(count), chance.split(count), strict=True)
    drawn = [_continue(program, *part, progress) for part in parts]
    joined = torch.cat(drawn).reshape(rows, each * size)[:, :length]
    return [repeat_segments(joined, generator)]


def reads_text(teacher: Program) -> str:
    """What drawing costs, before it is done."""
    size = bytes_text(parameter_bytes(teacher, all_parameters(teacher)))
    return (
        f"no data is given: own samples are drawn, for which all weights ({size}) are read {PIECE - 1} times, more "
        "often where not all pieces fit in memory at once; text (--data FILE) needs none of it"
    )


def at_once(program: Program, size: int, vocabulary: int) -> int:
    """How many pieces of `size` tokens run together."""
    states = [node.meta["state"] for node in program.placeholders() if "state" in node.meta]
    row = sum(state.bytes(1, size) for state in states) + LOGITS * 4 * vocabulary
    free = free_memory()
    limit = program.weights.limit if program.weights is not None else None
    room = free if limit is None else max(0, min(free, limit - used_memory()))
    return max(1, int(SHARE * room) // (2 * row))  # twice: the keys before a step and those behind it


@torch.no_grad()
def _continue(program: Program, first: Tensor, chance: Tensor, progress: Progress) -> Tensor:
    """int64 [B, T] from first tokens [B, 1] and a random number for every further one [B, T - 1]."""
    inputs = program.placeholders()
    output = next(node for node in program.graph.nodes if node.op == "output")
    states = {
        str(node.target): node.meta["state"].zeros(len(first), program.place) for node in inputs if "state" in node.meta
    }
    found = [first]
    for place in progress.track(range(chance.shape[1]), "sampling the teacher from disk"):
        given = {TOKENS: found[-1], MASK: torch.ones_like(first), POSITIONS: torch.full_like(first, place), **states}
        values = {node: given[str(node.target)] for node in inputs}
        logits, *new = evaluate(program.module, list(output.args[0]), values)  # type: ignore[arg-type]
        states = dict(zip(states, new, strict=True))
        found.append(drawn_by(logits[:, -1], chance[:, place : place + 1]))
    return torch.cat(found, dim=1)


def drawn_by(logits: Tensor, chance: Tensor) -> Tensor:
    """int64 [B, 1]: the first token whose cumulative probability reaches a number [B, 1] between 0 and 1."""
    reached = torch.softmax(logits.double(), dim=-1).cumsum(-1)
    return torch.searchsorted(reached, chance.double() * reached[:, -1:]).clamp_max(logits.shape[-1] - 1)
