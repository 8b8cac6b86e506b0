"""Runs of the model at shapes that were not traced: inputs made up for them, and how far two results lie apart."""

from __future__ import annotations

import contextlib
import io
import logging
from collections.abc import Iterator

import torch
from torch import nn

from linearize.program import MASK, POSITIONS, TOKENS

# Unlike each other and any config size, so that a dim that follows the batch or the length shows which one it follows.
PROBES = ((2, 13), (3, 17), (5, 11))


def probe_inputs(
    names: list[str], batch: int, length: int, vocab_size: int, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Reproducible int64 [B, T] by name: random token ids below `vocab_size`, a mask of ones, positions from 0."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (batch, length), generator=generator).to(device)
    made = {
        TOKENS: ids,
        MASK: torch.ones_like(ids),
        POSITIONS: torch.arange(length, device=device).expand(batch, length).contiguous(),
    }
    return {name: made[name] for name in names if name in made}


def safe_vocabulary(model: nn.Module) -> int:
    """A number of token ids that every embedding of the model has rows for."""
    rows = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(min(rows, default=2), 2)


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| over max |expected|; NaN counts as infinite."""
    if not actual.numel():
        return 0.0
    worst = ((actual - expected).abs().amax() / expected.abs().amax().clamp_min(1e-12)).item()
    return worst if worst == worst else float("inf")


def first_line(error: BaseException) -> str:
    """The first line of an error's text that holds anything, else the error's type."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def why_untraced(error: BaseException) -> str:
    """What kept torch.export from tracing, in a clause."""
    text, kind = str(error), type(error).__name__
    if "Constraints violated" in text:
        return "the size of its input decides what it computes (a loop or a branch over the tokens)"
    if needs_values(error):
        return f"the values of a tensor decide what it computes ({first_line(error)[:120]})"
    return f"{kind}: {first_line(error)[:200]}"


def needs_values(error: BaseException) -> bool:
    """Whether tracing stopped at the values of a tensor, which static sizes do not give."""
    return "data-dependent" in str(error).lower() or "DataDependent" in type(error).__name__


@contextlib.contextmanager
def quiet_export() -> Iterator[None]:
    """Keep torch.export from printing the whole graph when it fails: the error says where and what."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)
