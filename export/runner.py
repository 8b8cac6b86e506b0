"""Run an exported directory with onnxruntime and numpy alone. Copy this file into a project that has nothing else.

The manifest says everything: which inputs the graph takes, which state tensor of one call feeds which of the next.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

try:
    from linearize.errors import ArtifactError, DataError
except ImportError:  # outside the project

    class ArtifactError(Exception):  # type: ignore[no-redef]
        """The directory cannot be run."""

    class DataError(Exception):  # type: ignore[no-redef]
        """Token ids, a mask or a state that do not fit."""


FORMAT = 1
NEEDED = ("graph", "inputs", "states", "weights", "prefill_piece", "vocab_size")


@dataclass(frozen=True)
class OnnxState:
    """The state after some tokens: onnxruntime values by input name. Immutable, so keeping an old one is a fork."""

    values: dict[str, Any]
    tokens: int

    def arrays(self) -> dict[str, np.ndarray]:
        return {name: value.numpy() for name, value in self.values.items()}

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays().values())


class OnnxModel:
    """An exported model: T tokens and a state in, logits and the new state out.

    Args:
        directory: what `linearize.export` wrote.
        threads: of onnxruntime; None leaves it to it.
        arena: keep what a call frees for the next one. Without it calls are slower, and take less memory.

    Raises:
        ArtifactError: the directory is not such a one, a file is missing, or onnxruntime cannot load the graph.
    """

    def __init__(self, directory: str | Path, threads: int | None = None, arena: bool = True) -> None:
        import onnxruntime

        self.directory = Path(directory)
        self.manifest = _read_manifest(self.directory)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        options.enable_cpu_mem_arena = arena
        if threads is not None:
            options.intra_op_num_threads = threads
        path = self.directory / self.manifest["graph"]
        try:
            self.session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no common base
            raise ArtifactError(
                f"onnxruntime {onnxruntime.__version__} cannot load {path} (needs "
                f"{self.manifest.get('minimum_onnxruntime', '?')} or later): {str(error).strip().splitlines()[0]}"
            ) from error
        self._value = onnxruntime.OrtValue.ortvalue_from_numpy
        self._inputs = [entry["name"] for entry in self.manifest["inputs"]]
        self._states = self.manifest["states"]
        self.grows = any(entry.get("grows") is not None for entry in self._states)
        self._outputs = ["logits", *(entry["out"] for entry in self._states)]

    def verify(self) -> None:
        """Compare the weights with the hash in the manifest.

        Raises:
            ArtifactError: they differ, or cannot be read.
        """
        entry = self.manifest["weights"]
        path = self.directory / entry["file"]
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
        if found != entry["sha256"]:
            raise ArtifactError(
                f"{path} is not what was exported: sha256 {found[:12]}..., not {entry['sha256'][:12]}..."
            )

    def empty_state(self, batch: int) -> OnnxState:
        """The state before the first token."""
        sizes = {"batch": batch, "past": 0}
        arrays = {
            entry["in"]: np.zeros([sizes.get(dim, dim) for dim in entry["shape"]], dtype=entry["dtype"])
            for entry in self._states
        }
        return self.state_from(arrays, tokens=0)

    def state_from(self, arrays: dict[str, np.ndarray], tokens: int) -> OnnxState:
        """A state from arrays by input name (`past....`), `tokens` of which have been processed."""
        values = {entry["in"]: self._value(np.asarray(arrays[entry["in"]], order="C")) for entry in self._states}
        return OnnxState(values, tokens)

    def step(
        self, input_ids: Any, state: OnnxState | None = None, attention_mask: Any = None
    ) -> tuple[np.ndarray, OnnxState]:
        """T >= 1 further tokens int [B, T] -> (logits float32 [B, T, V], the new state).

        `attention_mask` [B, T] is 0 at padding, which may only stand left of a row's tokens.

        Raises:
            DataError: token ids or a mask that do not fit, or more tokens than the source's learned positions.
        """
        ids = self._checked(input_ids)
        state = state or self.empty_state(ids.shape[0])
        self.check_room(state.tokens + ids.shape[1])
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask).astype(np.int64)
        if mask.shape != ids.shape:
            raise DataError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}")
        feeds = {"input_ids": self._value(ids), "attention_mask": self._value(np.asarray(mask, order="C"))}
        if "position_ids" in self._inputs:
            seen = state.values["past.seen"].numpy()[:, None]  # the row's real tokens so far
            feeds["position_ids"] = self._value(np.maximum(seen + np.cumsum(mask, axis=1) - 1, 0))
        logits, *new = self.session.run_with_ort_values(self._outputs, {**feeds, **state.values})
        values = {entry["in"]: value for entry, value in zip(self._states, new, strict=True)}
        return logits.numpy(), OnnxState(values, state.tokens + ids.shape[1])

    def check_room(self, tokens: int) -> None:
        """Raise `DataError` if that many tokens are more than the source has learned positions for."""
        limit = self.manifest.get("max_positions")
        if limit is not None and tokens > limit:
            raise DataError(f"{tokens} tokens pass the source's {limit} learned positions")

    def prefill(self, input_ids: Any, attention_mask: Any = None) -> tuple[np.ndarray, OnnxState]:
        """A prompt int [B, T] in pieces of the manifest's size -> (logits [B, V] after its last token, state)."""
        ids = self._checked(input_ids)
        mask = np.ones_like(ids) if attention_mask is None else np.asarray(attention_mask)
        state, piece = None, self.manifest["prefill_piece"]
        for start in range(0, ids.shape[1], piece):
            part = slice(start, start + piece)
            logits, state = self.step(ids[:, part], state, mask[:, part])
        assert state is not None
        return logits[:, -1], state

    def stream(self, input_ids: Any, max_new_tokens: int, attention_mask: Any = None) -> Iterator[np.ndarray]:
        """The most likely next tokens int64 [B], one step at a time."""
        if max_new_tokens < 1:
            return
        logits, state = self.prefill(input_ids, attention_mask)
        decoder = None if self.grows or self.manifest["vocab_size"] is None else Decoder(self, state)
        for count in range(max_new_tokens):
            tokens = logits.argmax(axis=-1).astype(np.int64)
            yield tokens
            if count + 1 == max_new_tokens:
                return
            if decoder is not None:
                logits = decoder.step(tokens)
            else:
                step_logits, state = self.step(tokens[:, None], state)
                logits = step_logits[:, -1]

    def generate(
        self, input_ids: Any, max_new_tokens: int = 20, attention_mask: Any = None, eos_token_id: int | None = None
    ) -> np.ndarray:
        """Greedy continuation: int [B, T] -> int64 [B, T + n]. Rows that produced `eos_token_id` are filled with it,
        and generation ends when all have (n < max_new_tokens then)."""
        ids = self._checked(input_ids)
        columns, finished = [ids], np.zeros(ids.shape[0], dtype=bool)
        for tokens in self.stream(ids, max_new_tokens, attention_mask):
            if eos_token_id is not None:
                tokens = np.where(finished, eos_token_id, tokens)
                finished |= tokens == eos_token_id
            columns.append(tokens[:, None])
            if finished.all():
                break
        return np.concatenate(columns, axis=1)

    def _checked(self, input_ids: Any) -> np.ndarray:
        ids = np.asarray(input_ids)
        if ids.ndim != 2 or ids.size == 0 or ids.dtype.kind not in "iu":
            raise DataError(f"input_ids must be integers [batch, length], not {list(ids.shape)} {ids.dtype}")
        vocab_size = self.manifest["vocab_size"]
        if vocab_size is not None and (ids.min() < 0 or ids.max() >= vocab_size):
            raise DataError(f"token ids {ids.min()}..{ids.max()} are not all within the vocabulary 0..{vocab_size - 1}")
        return np.asarray(ids.astype(np.int64), order="C")


class Decoder:
    """Single steps with everything bound once: two sets of states that change places, so that a step allocates and
    copies nothing. On small models that is a third of its time. Needs states that do not grow; the one that it starts
    from stays as it is.

    >>> decoder = Decoder(model, state)
    >>> logits = decoder.step(tokens)  # int64 [B] -> float32 [B, V]
    """

    def __init__(self, model: OnnxModel, state: OnnxState) -> None:
        self.model, self.tokens = model, state.tokens
        rows = next(entry["in"] for entry in model.manifest["states"] if entry["shape"][:1] == ["batch"])
        batch = state.values[rows].shape()[0]
        value, column = model._value, np.ones((batch, 1), dtype=np.int64)
        self.inputs = {entry["name"]: value(column.copy()) for entry in model.manifest["inputs"]}
        seen = state.values.get("past.seen")
        self.positions = None if seen is None else seen.numpy()[:, None].copy()
        vocabulary = model.manifest["vocab_size"]
        self.logits = value(np.zeros((batch, 1, vocabulary), dtype=np.float32))
        ping, pong = ({name: value(np.zeros_like(held.numpy())) for name, held in state.values.items()} for _ in "ab")
        self.bindings = [self._bound(*pair) for pair in ((state.values, ping), (ping, pong), (pong, ping))]
        self.turn = 0

    def _bound(self, now: dict[str, Any], then: dict[str, Any]) -> Any:
        binding = self.model.session.io_binding()
        for name, value in self.inputs.items():
            binding.bind_ortvalue_input(name, value)
        for entry in self.model.manifest["states"]:
            binding.bind_ortvalue_input(entry["in"], now[entry["in"]])
            binding.bind_ortvalue_output(entry["out"], then[entry["in"]])
        binding.bind_ortvalue_output("logits", self.logits)
        return binding

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """The logits after one more token a row.

        Raises:
            DataError: more tokens than the source's learned positions.
        """
        self.model.check_room(self.tokens + 1)
        self.inputs["input_ids"].update_inplace(np.ascontiguousarray(tokens, dtype=np.int64)[:, None])
        if "position_ids" in self.inputs and self.positions is not None:
            self.inputs["position_ids"].update_inplace(self.positions)
            self.positions = self.positions + 1
        self.model.session.run_with_iobinding(self.bindings[self.turn])
        self.turn = 2 if self.turn == 1 else 1
        self.tokens += 1
        return np.asarray(self.logits.numpy()[:, 0])


def _read_manifest(directory: Path) -> dict[str, Any]:
    path = directory / "linearize.json"
    try:
        manifest = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}; is this an exported directory?") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("kind") != "linearized-onnx":
        raise ArtifactError(f"{path} does not describe an exported model; run `linearize export` on it first")
    if manifest.get("format") != FORMAT:
        raise ArtifactError(f"{path} has format {manifest.get('format')!r}; this runner reads {FORMAT}")
    missing = [key for key in NEEDED if key not in manifest]
    if missing:
        raise ArtifactError(f"{path} lacks {missing[0]!r}")
    return manifest
