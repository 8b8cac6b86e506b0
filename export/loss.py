"""What quantising costs, measured when a file is written: on tokens drawn from the model itself, with seed 0.

perplexity = e^{mean of -log p(next token)};  KL = mean over tokens of KL(p_float32 || p_quantised), in nats.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from linearize.export.manifest import Quantization
from linearize.export.names import GRAPH_FILE, WEIGHTS_FILE
from linearize.export.runner import OnnxModel
from linearize.runtime.generate import Sampling, generate

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel

ROWS, TOKENS = 4, 256


def measure_loss(ids: np.ndarray, before: Path, after: Path, kind: str, count: int) -> Quantization:
    """Of the quantised directory `after` against the float32 one `before`, on tokens int64 [B,T] (`own_tokens`)."""
    expected, found = (log_probabilities(OnnxModel(folder), ids) for folder in (before, after))
    sizes = [sum((folder / name).stat().st_size for name in (GRAPH_FILE, WEIGHTS_FILE)) for folder in (before, after)]
    return Quantization(
        kind=kind,  # type: ignore[arg-type]
        weights=count,
        perplexity=perplexity(found, ids),
        perplexity_float32=perplexity(expected, ids),
        kl=float((np.exp(expected) * (expected - found)).sum(axis=-1).mean()),
        tokens=ids.size,
        bytes=sizes[1],
        bytes_float32=sizes[0],
    )


def own_tokens(compiled: LinearizedModel) -> np.ndarray:
    """int64 [ROWS, TOKENS], or as many as the source has positions."""
    length = min(TOKENS, compiled.program.max_positions or TOKENS)
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(compiled.vocab_size or 2, (ROWS, 1), generator=generator)
    sampling = Sampling(do_sample=True, seed=0)
    return generate(compiled, first, length - 1, sampling).numpy()


def log_probabilities(model: OnnxModel, ids: np.ndarray) -> np.ndarray:
    """float64 [B, T, V], fed in pieces."""
    piece, state, parts = model.manifest["prefill_piece"], None, []
    for start in range(0, ids.shape[1], piece):
        logits, state = model.step(ids[:, start : start + piece], state)
        parts.append(logits.astype(np.float64))
    scores = np.concatenate(parts, axis=1)
    top = scores.max(axis=-1, keepdims=True)
    return scores - top - np.log(np.exp(scores - top).sum(axis=-1, keepdims=True))


def perplexity(log_p: np.ndarray, ids: np.ndarray) -> float:
    chosen = np.take_along_axis(log_p[:, :-1], ids[:, 1:, None], axis=-1)
    return float(np.exp(-chosen.mean()))
