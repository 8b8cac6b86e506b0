"""What scoring a model that stays on disk will take, told before it starts.

    memory = the process now + weights of the largest block + all that its run makes (the way back reads it again)
             + the logits and their distribution, if it is the last
             + SAMPLES gradients of a site's output on every row, and of what crosses two cuts on one
             + scores of attention, a mask of a window, and what a mixer makes of them: 4 [H,T,T]
             + a shard of the spill
    disk   = every cut, and two of gradients, on every row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from linearize.calibration.blocks import Blocks, parameter_bytes, shape_at
from linearize.calibration.forecast import MARGIN, SLACK
from linearize.calibration.limits import free_disk, free_memory, used_memory
from linearize.calibration.scores import cache_folder
from linearize.calibration.spill import SHARD
from linearize.errors import DataError
from linearize.planner.scores import SAMPLES
from linearize.printing import bytes_text
from linearize.program import Program
from linearize.tensorfile import bytes_of

WIDE = 4  # bytes of a number of logits, scores and gradients
DISTRIBUTIONS, ATTENTIONS = 5, 4  # logits, their logarithm, its exponential, two gradients; and see above


@dataclass(frozen=True)
class Needed:
    """Bytes. `memory` includes what the process has now."""

    memory: int
    disk: int
    block: int

    def __str__(self) -> str:
        return (
            f"about {bytes_text(self.memory)} of memory (largest block {bytes_text(self.block)}) and "
            f"{bytes_text(self.disk)} of disk for a while"
        )


def check_memory(
    teacher: Program, batches: Sequence[Tensor], memory: int | None, say: Callable[[str], None]
) -> None:
    """Tell, and refuse before the work, what scoring on these batches int64 [B, T] takes.

    Raises:
        DataError: memory or disk is short; it says how much, and what helps.
    """
    found, free = needed(teacher, batches), used_memory() + free_memory()
    limit = free if memory is None else min(memory, free)
    say(f"scoring block by block needs {found}")
    if found.memory > limit:
        raise DataError(
            f"scoring needs {found}, and there are {bytes_text(limit)} of memory; what helps: shorter rows (--length), "
            "fewer tokens (--tokens), more memory"
        )
    folder = cache_folder("planner")
    if found.disk > free_disk(folder):
        raise DataError(
            f"scoring needs {found}, and {folder} has {bytes_text(free_disk(folder))} free; set LINEARIZE_CACHE to a "
            "folder on another disk, or score on fewer tokens"
        )


def needed(teacher: Program, batches: Sequence[Tensor]) -> Needed:
    blocks = Blocks(teacher)
    rows, length = max(batch.shape[0] for batch in batches), max(batch.shape[1] for batch in batches)
    cuts = range(len(blocks.crossing))
    weights = [parameter_bytes(teacher, _read_behind(blocks, cut)) for cut in cuts]
    made = [_made_behind(blocks, cut, rows, length) for cut in cuts]
    wide = max((site.attention.heads, site.attention.value_dim) for site in teacher.matched)
    heads = max(site.attention.heads for site in teacher.matched)
    gradients = SAMPLES * WIDE * rows * length * wide[0] * wide[1] * len(batches)
    crossing = [blocks.width(cut, rows, length) for cut in cuts]
    attention = ATTENTIONS * WIDE * rows * heads * length * length
    logits = DISTRIBUTIONS * WIDE * rows * length * (teacher.vocab_size or 1)
    block = max(w + m for w, m in zip(weights, made, strict=True))
    moving = 2 * (SAMPLES + 1) * max(crossing) + SHARD
    memory = int((block + gradients + attention + logits + moving) * MARGIN) + SLACK + used_memory()
    return Needed(memory, (sum(crossing) + 2 * SAMPLES * max(crossing)) * len(batches), max(weights))


def _read_behind(blocks: Blocks, cut: int) -> set[str]:
    """Names of the parameters that a block reads; the last one with the output projection."""
    return {str(node.target) for node in blocks.inside(cut) if node.op == "get_attr"}


def _made_behind(blocks: Blocks, cut: int, rows: int, length: int) -> int:
    """Bytes of every tensor that a block makes, as what gradients read stays."""
    total = 0
    for node in blocks.inside(cut):
        value = node.meta.get("val")
        if node.op != "get_attr" and isinstance(value, Tensor):
            total += bytes_of(value.dtype, shape_at(blocks.program, node, rows, length))
    return total
