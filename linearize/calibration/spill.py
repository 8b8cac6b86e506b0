"""What crosses a cut, batch by batch: in memory where it fits, else on disk in shards of bounded size.

    FOLDER/train-cut-3/00007.safetensors    the tensors of some batches, by "batch.place among those that cross"
    FOLDER/train-cut-3/complete             how many batches, and tensors of each; written last

Shards are read by slices, not mapped. A cut that is complete on disk is found again by a later run; the one before it
is removed when the next is complete, so there are never more than two.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from linearize.errors import ArtifactError
from linearize.files import write_atomically
from linearize.tensorfile import Planned, Stored, read_header, read_tensor, write_tensors

COMPLETE = "complete"
SHARD = 64 << 20


class Spill:
    """`folder` None keeps everything in memory. `shard` is the size from which a shard is written."""

    def __init__(self, folder: Path | None = None, name: str = "", shard: int = SHARD) -> None:
        self.folder, self.name, self.shard = folder, name, shard
        self._memory: dict[int, list[list[Tensor]]] = {}
        self._places: dict[int, dict[int, dict[str, Stored]]] = {}

    def newest(self, upto: int, batches: int, crossing: Sequence[int]) -> int:
        """The last complete cut that is not behind `upto`; 0, where nothing crosses, if there is none. `crossing`: how
        many tensors cross each cut."""
        found = [cut for cut in range(upto, 0, -1) if self._complete(cut, batches, crossing[cut])]
        return found[0] if found else 0

    def writer(self, cut: int) -> Writer:
        return Writer(self, cut)

    def read(self, cut: int, batch: int) -> list[Tensor]:
        """The tensors that cross, in the order in which they were written."""
        if cut in self._memory:
            return self._memory[cut][batch]
        found = self._index(cut).get(batch, {})
        return [read_tensor(found[f"{batch}.{place}"]) for place in range(len(found))]

    def drop(self, cut: int) -> None:
        self._memory.pop(cut, None)
        self._places.pop(cut, None)
        if self.folder is not None:
            (self._at(cut) / COMPLETE).unlink(missing_ok=True)
            shutil.rmtree(self._at(cut), ignore_errors=True)

    def _at(self, cut: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{self.name}-cut-{cut}"

    def _complete(self, cut: int, batches: int, crossing: int) -> bool:
        if cut in self._memory:
            return True
        if self.folder is None or not (self._at(cut) / COMPLETE).is_file():
            return False
        try:
            found = {len(tensors) for tensors in self._index(cut).values()}
            return (self._at(cut) / COMPLETE).read_text() == f"{batches} {crossing}" and found == {crossing}
        except (ArtifactError, OSError, ValueError):
            return False

    def _index(self, cut: int) -> dict[int, dict[str, Stored]]:
        if cut not in self._places:
            found: dict[int, dict[str, Stored]] = {}
            for file in sorted(self._at(cut).glob("*.safetensors")):
                for key, stored in read_header(file)[0].items():
                    found.setdefault(int(key.partition(".")[0]), {})[key] = stored
            self._places[cut] = found
        return self._places[cut]


class Writer:
    """Takes the batches of one cut in order; `close` makes the cut complete."""

    def __init__(self, spill: Spill, cut: int) -> None:
        self._spill, self._cut = spill, cut
        self._pending: dict[str, Tensor] = {}
        self._all: list[list[Tensor]] = []
        self._batches = self._crossing = self._shards = self._bytes = 0
        if spill.folder is not None:
            spill.drop(cut)  # what an interrupted run left of it
            try:
                spill._at(cut).mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise ArtifactError(f"cannot write {spill._at(cut)}: {error.strerror or error}") from error

    def add(self, tensors: list[Tensor]) -> None:
        if self._spill.folder is None:
            self._all.append(tensors)
            return
        self._crossing = len(tensors)
        for place, tensor in enumerate(tensors):
            self._pending[f"{self._batches}.{place}"] = tensor
            self._bytes += tensor.numel() * tensor.element_size()
        self._batches += 1
        if self._bytes >= self._spill.shard:
            self._flush()

    def close(self) -> None:
        if self._spill.folder is None:
            self._spill._memory[self._cut] = self._all
            return
        self._flush()
        write_atomically(self._spill._at(self._cut) / COMPLETE, f"{self._batches} {self._crossing}".encode())

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._spill._at(self._cut) / f"{self._shards:05d}.safetensors"
        write_tensors(path, {name: Planned.of(tensor) for name, tensor in self._pending.items()}, {})
        self._pending, self._bytes, self._shards = {}, 0, self._shards + 1
