"""The tensors of a model that stays on disk: read one at a time, those of the block that runs kept.

A program whose parameters are on the meta device has its values here. `rewriting.walk.evaluate` asks for each where
the graph reads it, so that what is in memory is the held block and the one tensor that is used.
"""

from __future__ import annotations

import ctypes
import hashlib
import sys
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from linearize.errors import ArtifactError
from linearize.tensorfile import Stored, bytes_of, read_tensor

Change = Callable[[Tensor], Tensor]
ATTACHED = "_linearize_weights"
SLICE = 4096


class Weights:
    """By the names that the graph has for them.

    Args:
        stored: where the parameters are.
        dtypes: what each has to be in memory.
        values: what is not in the files, small: buffers that the source computes when it is made.
        device: where they are wanted.

    `limit`: bytes that the process may take, where that is bounded.
    """

    def __init__(
        self,
        stored: Mapping[str, Stored],
        dtypes: Mapping[str, torch.dtype],
        values: Mapping[str, Tensor],
        device: torch.device | str = "cpu",
    ) -> None:
        self.stored, self.dtypes, self.values = dict(stored), dict(dtypes), dict(values)
        self.device = torch.device(device)
        self.limit: int | None = None
        self.changes: dict[str, Change] = {}
        self._wanted: set[str] = set()
        self._held: dict[tuple[object, int], Tensor] = {}

    def __contains__(self, name: str) -> bool:
        return name in self.stored or name in self.values

    def get(self, name: str) -> Tensor:
        """Raises ArtifactError where nothing of that name is known, or its file cannot be read."""
        if name in self.values:
            return self.values[name].to(self.device)
        if name not in self.stored:
            raise ArtifactError(f"{name} has no values: it is in none of the checkpoint's files")
        if name in self.changes:
            return self.changes[name](self._read(name))
        return self._read(name)

    def changed(self, changes: Mapping[str, Change]) -> Weights:
        """The same files, with some parameters made of what is stored for them."""
        found = Weights(self.stored, self.dtypes, self.values, self.device)
        found.limit, found.changes = self.limit, {**self.changes, **changes}
        return found

    def _read(self, name: str) -> Tensor:
        stored = self.stored[name]
        key = (stored.path, stored.start)  # two names of a tied tensor are one
        if key in self._held:
            return self._held[key]
        tensor = read_tensor(stored).to(self.device, self.dtypes.get(name, stored.dtype))
        if name in self._wanted:
            self._held[key] = tensor
        return tensor

    def hold(self, names: Iterable[str]) -> None:
        """Keep these once they are read, and nothing else."""
        self._wanted = {name for name in names if name in self.stored}
        keys = {(self.stored[name].path, self.stored[name].start) for name in self._wanted}
        self._held = {key: tensor for key, tensor in self._held.items() if key in keys}

    def bytes_of(self, names: Iterable[str]) -> int:
        """In memory, those that are tied counted once."""
        places = {(self.stored[name].path, self.stored[name].start): name for name in names if name in self.stored}
        return sum(bytes_of(self.dtypes.get(name, self.stored[name].dtype), self.stored[name].shape)
                   for name in places.values())  # fmt: skip

    def key(self) -> str:
        """A hash of names, shapes and three slices of each tensor's bytes, and of the values in memory."""
        digest = hashlib.sha256()
        for name, stored in sorted(self.stored.items()):
            digest.update(f"{name} {list(stored.shape)} {stored.dtype}".encode())
            with stored.path.open("rb") as file:
                for offset in (0, stored.nbytes // 2, max(0, stored.nbytes - SLICE)):
                    file.seek(stored.start + offset)
                    digest.update(file.read(min(SLICE, stored.nbytes - offset)))
        for name, value in sorted(self.values.items()):
            digest.update(f"{name} {list(value.shape)} {value.dtype}".encode())
            digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


def give_memory_back() -> None:
    """What was freed goes back to the system: the C library keeps it, in pieces that the next block does not fit."""
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)
