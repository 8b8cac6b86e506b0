"""The self-check at writing: the file in onnxruntime against the model in PyTorch, from states that real tokens made.

Each shape [B, T] is fed once from a state after random prompts (left-padded where B > 1), and once, padded, from the
empty state; then a prompt and greedy steps, both fed with PyTorch's tokens so that one near tie cannot spoil the rest.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from linearize.errors import ExportError
from linearize.export.interface import Interface
from linearize.export.manifest import Verified
from linearize.export.names import PREFILL_PIECE
from linearize.export.runner import OnnxModel, OnnxState

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel
    from linearize.runtime.state import State

TOLERANCE = 1e-4  # absolute, relative to max(1, the largest entry)
LENGTHS = (1, 7, PREFILL_PIECE, PREFILL_PIECE + 22)
BATCHES = (1, 4)
WARM, PADDING = 150, 3  # beyond usual windows, so that far fields are not empty
PROMPT, STEPS = 100, 50


def check_parity(compiled: LinearizedModel, folder: Path, interface: Interface) -> Verified:
    """Compare, and say what was compared.

    Raises:
        ExportError: naming the shape and the difference that is too large.
    """
    with torch.no_grad():
        return _Comparison(compiled, folder, interface).run()


class _Comparison:
    def __init__(self, compiled: LinearizedModel, folder: Path, interface: Interface) -> None:
        self.compiled, self.interface = compiled, interface
        self.runner = OnnxModel(folder, threads=torch.get_num_threads())
        self.generator = torch.Generator().manual_seed(0)
        self.limit = compiled.program.max_positions or 1 << 30
        self.logit_difference = self.state_difference = 0.0

    def run(self) -> Verified:
        import onnxruntime

        warm = min(WARM, self.limit // 2)
        shapes = [(b, t) for b in BATCHES for t in LENGTHS if warm + t <= self.limit]
        for batch, length in shapes:
            self._from_warm_state(batch, warm, length)
        padded = [(b, t) for b, t in shapes if b > 1 and t > PADDING]
        for batch, length in padded:
            ids, mask = self._tokens(batch, length), left_padding(batch, length)
            self._compare(ids, mask, None, f"batch {batch}, {length} left-padded tokens from the empty state")
        prompt, steps, equal = self._greedy()
        return Verified(
            largest_logit_difference=self.logit_difference,
            largest_state_difference=self.state_difference,
            tolerance=TOLERANCE,
            shapes=[list(shape) for shape in shapes],
            padded_shapes=[list(shape) for shape in padded],
            prefill_tokens=prompt,
            greedy_tokens_compared=steps,
            greedy_tokens_equal=equal,
            onnxruntime=onnxruntime.__version__,
            torch=torch.__version__,
        )

    def _tokens(self, batch: int, length: int) -> Tensor:
        return torch.randint(self.compiled.vocab_size or 2, (batch, length), generator=self.generator)

    def _from_warm_state(self, batch: int, warm: int, length: int) -> None:
        mask = left_padding(batch, warm)
        _, state = self.compiled.step(self._tokens(batch, warm), attention_mask=mask)
        ids = self._tokens(batch, length)
        self._compare(ids, torch.ones_like(ids), state, f"batch {batch}, {length} tokens from a random state")

    def _compare(self, ids: Tensor, mask: Tensor, state: State | None, what: str) -> None:
        expected, new = self.compiled.step(ids, state, attention_mask=mask)
        found, found_state = self.runner.step(ids.numpy(), self._as_onnx(state), mask.numpy())
        real = mask.bool().numpy()
        self._logits(expected.numpy()[real], found[real], what)
        self._states(new, found_state, what)

    def _as_onnx(self, state: State | None) -> OnnxState | None:
        if state is None:
            return None
        return self.runner.state_from(self._packed(state), state.tokens)

    def _packed(self, state: State) -> dict[str, np.ndarray]:
        """By input name, as the file carries it."""
        tensors = self.interface.pack(state)
        return {port.past: value.numpy() for port, value in zip(self.interface.ports, tensors, strict=True)}

    def _logits(self, expected: np.ndarray, found: np.ndarray, what: str) -> None:
        self.logit_difference = max(self.logit_difference, check_close(expected, found, f"logits, {what}"))

    def _states(self, expected: State, found: OnnxState, what: str) -> None:
        arrays = found.arrays()
        for name, tensor in self._packed(expected).items():
            difference = check_close(tensor, arrays[name], f"state {name}, {what}")
            self.state_difference = max(self.state_difference, difference)

    def _greedy(self) -> tuple[int, int, int]:
        """(prompt tokens, greedy steps, steps whose most likely token is the same)."""
        prompt = min(PROMPT, self.limit // 2)
        steps, equal = min(STEPS, self.limit - prompt), 0
        ids = self._tokens(1, prompt)
        expected, state = self.compiled.step(ids)
        found, onnx_state = self.runner.step(ids.numpy())
        for step in range(steps):
            self._logits(expected.numpy(), found, f"batch 1, prompt of {prompt}, after {step} greedy steps")
            tokens = expected[:, -1:].argmax(dim=-1)
            equal += int(found[0, -1].argmax() == tokens.item())
            expected, state = self.compiled.step(tokens, state)
            found, onnx_state = self.runner.step(tokens.numpy(), onnx_state)
        self._states(state, onnx_state, f"after a prompt of {prompt} and {steps} greedy steps")
        return prompt, steps, equal


def left_padding(batch: int, length: int) -> Tensor:
    """int64 [B, T]: ones, with zeros left of all rows but the last if there are several: `PADDING`, twice that, .."""
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(batch - 1):
        mask[row, : min((row + 1) * PADDING, length - 1)] = 0
    return mask


def check_close(expected: np.ndarray, found: np.ndarray, what: str) -> float:
    """The largest difference relative to max(1, the largest entry); exact for integers and booleans.

    Raises:
        ExportError: it is above the tolerance, or shapes, dtypes or finiteness differ.
    """
    if expected.shape != found.shape or expected.dtype != found.dtype:
        raise ExportError(
            f"the ONNX file disagrees with PyTorch ({what}): {found.dtype}{list(found.shape)} "
            f"instead of {expected.dtype}{list(expected.shape)}"
        )
    if expected.size == 0:
        return 0.0
    if expected.dtype.kind != "f":
        difference = float((expected != found).sum())
    else:
        difference = float(np.abs(expected - found).max() / max(1.0, np.abs(expected).max()))
    if not difference <= TOLERANCE:
        raise ExportError(
            f"the ONNX file disagrees with PyTorch ({what}): largest difference {difference:.3g}, "
            f"tolerance {TOLERANCE:g}; nothing was written"
        )
    return difference
