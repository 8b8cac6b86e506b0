"""The recurrent state of a compiled model: named tensors, and how many tokens they have seen."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from linearize.errors import StateError
from linearize.files import write_atomically
from linearize.program import StateTensor

STATE = "state 1"


class State(Mapping[str, Tensor]):
    """Tensors by name in the order of `specs`. Immutable: a step returns a new one, so keeping an old one is a fork.

    `tokens` counts the tokens processed (padding included) since the state was empty.
    """

    def __init__(self, specs: Sequence[StateTensor], tensors: Sequence[Tensor], tokens: int) -> None:
        self.specs, self.tokens = tuple(specs), tokens
        self._tensors = {spec.name: tensor for spec, tensor in zip(specs, tensors, strict=True)}

    @staticmethod
    def empty(specs: Sequence[StateTensor], batch: int, device: torch.device | str) -> State:
        return State(specs, [spec.zeros(batch, device) for spec in specs], tokens=0)

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    @property
    def batch(self) -> int:
        return next(tensor.shape[0] for spec, tensor in zip(self.specs, self.values(), strict=True) if spec.batched)

    @property
    def nbytes(self) -> int:
        """Bytes that the tensors take now."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.values())

    def clone(self) -> State:
        return self._map(lambda tensor, _: tensor.clone())

    def to(self, device: torch.device | str) -> State:
        return self._map(lambda tensor, _: tensor.to(device))

    def select(self, rows: Tensor) -> State:
        """The state of some rows of the batch, in the order of `rows` int64 [n] (repeats allowed).

        Raises:
            StateError: a row is not in the batch.
        """
        if rows.numel() and (int(rows.min()) < 0 or int(rows.max()) >= self.batch):
            raise StateError(f"rows {rows.tolist()} are not all within the state's batch of {self.batch}")
        return self.take(rows)

    def take(self, rows: Tensor) -> State:
        """`select` for rows that are known to be in the batch: it does not wait for the device."""
        return self._map(
            lambda tensor, spec: tensor.index_select(0, rows.to(tensor.device)) if spec.batched else tensor
        )

    def repeat(self, times: int) -> State:
        """Every row `times` times, copies side by side: one prompt's state for several continuations."""
        return self._map(lambda tensor, spec: tensor.repeat_interleave(times, dim=0) if spec.batched else tensor)

    def save(self, path: str | Path) -> Path:
        """Write it as one safetensors file, to go on from later or elsewhere (`State.load`)."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.items()}
        return write_atomically(Path(path), save(tensors, metadata={"linearize": STATE, "tokens": str(self.tokens)}))

    @staticmethod
    def load(path: str | Path, specs: Sequence[StateTensor], device: torch.device | str = "cpu") -> State:
        """A saved state of the model whose `state_specs` are given; see also `LinearizedModel.load_state`.

        Raises:
            StateError: the file is missing or damaged, or holds the state of another model.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                about = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise StateError(f"cannot read the state {path}: {error}") from error
        if about.get("linearize") != STATE:
            raise StateError(f"{path} is no saved state; write one with State.save")
        wrong = first_difference(specs, tensors)
        if wrong:
            raise StateError(f"{path} is the state of another model: {wrong}")
        return State(specs, [tensors[spec.name].to(device) for spec in specs], int(about["tokens"]))

    def _map(self, function: Callable[[Tensor, StateTensor], Tensor]) -> State:
        tensors = [function(tensor, spec) for spec, tensor in zip(self.specs, self.values(), strict=True)]
        return State(self.specs, tensors, self.tokens)

    def __repr__(self) -> str:
        return f"State(batch={self.batch}, tokens={self.tokens}, tensors={len(self)}, bytes={self.nbytes})"


def first_difference(specs: Sequence[StateTensor], tensors: Mapping[str, Tensor]) -> str:
    """What keeps `tensors` from being a state of these specs, '' for nothing."""
    for spec in specs:
        found = tensors.get(spec.name)
        if found is None:
            return f"it lacks {spec.name}"
        shape = found.shape[1:] if spec.batched else found.shape
        sizes = [size for dim, size in enumerate(shape) if dim != spec.grows]
        wanted = [size for dim, size in enumerate(spec.shape) if dim != spec.grows]
        if found.dtype != spec.dtype or len(shape) != len(spec.shape) or sizes != wanted:
            return f"{spec.name} is {found.dtype} {list(found.shape)}, not {spec.dtype} {list(spec.shape)} a row"
    unknown = sorted(set(tensors) - {spec.name for spec in specs})
    return f"it has {unknown[0]} on top" if unknown else ""
