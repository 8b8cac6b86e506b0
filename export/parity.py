"""The self-check at writing: the file in onnxruntime against the model in PyTorch, from states that real tokens made.

Each shape [B, T] is fed once from a state after random tokens (left-padded where B > 1, one a batch size), and once,
padded, from the empty state; then a prompt and greedy steps, both fed with PyTorch's tokens so that one near tie cannot
spoil the rest.

PyTorch's results come first and are kept in files (`record`), so that its weights can be gone before onnxruntime reads
its own (`check_recorded`): at no time are two copies of a large model needed.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from linearize.errors import ArtifactError, ExportError
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


@dataclass
class Call:
    """One call of PyTorch's and what it gave; the arrays lie in a file of `Recorded.place`.

    ids, mask int64 [B,T]; logits float32 [B,T,V]; `state`: the states before it, by input name, none for the empty
    one, and `tokens`, how many made them; `new`: the states after it, none where they are not compared; `goes_on`: it
    takes the states that the call before gave; `chooses`: its last logits choose a greedy token.
    """

    what: str
    ids: np.ndarray
    mask: np.ndarray
    logits: np.ndarray
    state: dict[str, np.ndarray] = field(default_factory=dict)
    new: dict[str, np.ndarray] = field(default_factory=dict)
    tokens: int = 0
    goes_on: bool = False
    chooses: bool = False


@dataclass
class Recorded:
    """What `record` left in `place`, and the shapes that were fed."""

    place: Path
    shapes: list[tuple[int, int]]
    padded: list[tuple[int, int]]
    prompt: int
    calls: list[tuple[str, int, bool, bool]] = field(default_factory=list)  # a call's own fields but the arrays

    def add(self, call: Call) -> None:
        arrays = {"ids": call.ids, "mask": call.mask, "logits": call.logits}
        arrays |= {f"state {name}": value for name, value in call.state.items()}
        arrays |= {f"new {name}": value for name, value in call.new.items()}
        try:
            np.savez(self._path(len(self.calls)), **arrays)  # type: ignore[arg-type]
        except OSError as error:
            raise ArtifactError(f"cannot write {self.place}: {error.strerror or error}") from error
        self.calls.append((call.what, call.tokens, call.goes_on, call.chooses))

    def __iter__(self) -> Iterator[Call]:
        """One after another, each read when its turn has come."""
        for index, (what, tokens, goes_on, chooses) in enumerate(self.calls):
            with np.load(self._path(index)) as file:
                arrays = dict(file)
            state, new = (_with_prefix(arrays, prefix) for prefix in ("state ", "new "))
            fed = arrays["ids"], arrays["mask"], arrays["logits"]
            yield Call(what, *fed, state, new, tokens, goes_on, chooses)

    def _path(self, index: int) -> Path:
        return self.place / f"{index}.npz"


def _with_prefix(arrays: Mapping[str, np.ndarray], prefix: str) -> dict[str, np.ndarray]:
    return {name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)}


def check_parity(compiled: LinearizedModel, folder: Path, interface: Interface) -> Verified:
    """`record` and `check_recorded` in one, for a file that lies there already.

    Raises:
        ExportError: naming the shape and the difference that is too large.
    """
    with tempfile.TemporaryDirectory() as place:
        return check_recorded(record(compiled, interface, Path(place)), folder)


def record(compiled: LinearizedModel, interface: Interface, place: Path) -> Recorded:
    """PyTorch's side: run the model on all that is compared, into files of `place`, which exists."""
    with torch.no_grad():
        return _Recorder(compiled, interface, place).run()


class _Recorder:
    def __init__(self, compiled: LinearizedModel, interface: Interface, place: Path) -> None:
        self.compiled, self.interface = compiled, interface
        self.generator = torch.Generator().manual_seed(0)
        self.limit = compiled.program.max_positions or 1 << 30
        self.warm = min(WARM, self.limit // 2)
        shapes = [(b, t) for b in BATCHES for t in LENGTHS if self.warm + t <= self.limit]
        padded = [(b, t) for b, t in shapes if b > 1 and t > PADDING]
        self.recorded = Recorded(place, shapes, padded, min(PROMPT, self.limit // 2))

    def run(self) -> Recorded:
        for batch in dict.fromkeys(batch for batch, _ in self.recorded.shapes):
            self._from_warm_state(batch, [length for b, length in self.recorded.shapes if b == batch])
        for batch, length in self.recorded.padded:
            what = f"batch {batch}, {length} left-padded tokens from the empty state"
            self._call(what, self._tokens(batch, length), left_padding(batch, length))
        self._greedy()
        return self.recorded

    def _tokens(self, batch: int, length: int) -> Tensor:
        return torch.randint(self.compiled.vocab_size or 2, (batch, length), generator=self.generator)

    def _from_warm_state(self, batch: int, lengths: list[int]) -> None:
        _, state = self.compiled.step(self._tokens(batch, self.warm), attention_mask=left_padding(batch, self.warm))
        for length in lengths:
            ids = self._tokens(batch, length)
            self._call(f"batch {batch}, {length} tokens from a random state", ids, torch.ones_like(ids), state)

    def _call(self, what: str, ids: Tensor, mask: Tensor, state: State | None = None) -> None:
        logits, new = self.compiled.step(ids, state, attention_mask=mask)
        before = {} if state is None else self._packed(state)
        tokens = 0 if state is None else state.tokens
        self.recorded.add(Call(what, ids.numpy(), mask.numpy(), logits.numpy(), before, self._packed(new), tokens))

    def _greedy(self) -> None:
        prompt = self.recorded.prompt
        steps = min(STEPS, self.limit - prompt)
        ids, state = self._tokens(1, prompt), None
        for step in range(steps + 1):
            logits, state = self.compiled.step(ids, state)
            what = f"batch 1, prompt of {prompt}, after {step} greedy steps"
            new = self._packed(state) if step == steps else {}
            call = Call(what, ids.numpy(), torch.ones_like(ids).numpy(), logits.numpy(), new=new)
            call.goes_on, call.chooses = step > 0, step < steps
            self.recorded.add(call)
            ids = logits[:, -1:].argmax(dim=-1)

    def _packed(self, state: State) -> dict[str, np.ndarray]:
        """By input name, as the file carries it."""
        tensors = self.interface.pack(state)
        return {port.past: value.numpy() for port, value in zip(self.interface.ports, tensors, strict=True)}


def check_recorded(recorded: Recorded, folder: Path) -> Verified:
    """onnxruntime's side: the same calls with the file in `folder`.

    Raises:
        ExportError: naming the shape and the difference that is too large.
    """
    import onnxruntime

    runner = OnnxModel(folder, threads=torch.get_num_threads(), arena=False)
    logits = states = 0.0
    steps = equal = 0
    state: OnnxState | None = None
    for call in recorded:
        before = state if call.goes_on else runner.state_from(call.state, call.tokens) if call.state else None
        found, state = runner.step(call.ids, before, call.mask)
        for row, real in enumerate(call.mask.astype(bool)):  # row by row: a copy of all logits is large
            difference = check_close(call.logits[row][real], found[row][real], f"logits, {call.what}")
            logits = max(logits, difference)
        arrays = state.arrays() if call.new else {}
        for name, expected in call.new.items():
            states = max(states, check_close(expected, arrays[name], f"state {name}, {call.what}"))
        steps += call.chooses
        equal += int(call.chooses and found[0, -1].argmax() == call.logits[0, -1].argmax())
    return Verified(
        largest_logit_difference=logits,
        largest_state_difference=states,
        tolerance=TOLERANCE,
        shapes=[list(shape) for shape in recorded.shapes],
        padded_shapes=[list(shape) for shape in recorded.padded],
        prefill_tokens=recorded.prompt,
        greedy_tokens_compared=steps,
        greedy_tokens_equal=equal,
        onnxruntime=onnxruntime.__version__,
        torch=torch.__version__,
    )


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
