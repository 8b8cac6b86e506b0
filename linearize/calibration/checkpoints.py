"""Work done so far, kept on disk, so that a fit that was interrupted goes on where it stopped and ends the same.

    FOLDER/<key>/samples.safetensors    the teacher's own samples, if those are fitted on
    FOLDER/<key>/site-3.safetensors     the fitted mixer of site 3, and its row of the report
    FOLDER/<key>/end-to-end.safetensors where the distillation of the whole model stands (`end_to_end_state`)

`key` is a hash of all that the result depends on: model, plan, fit, data, seed, versions. Each file is complete or not
there. Sites are independent, so one that was cut off is simply fitted again from its start. Where the teacher's
activations are spilled to disk (`spill`), they are beside these files, and found again in the same way.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from linearize.errors import ArtifactError
from linearize.files import write_atomically
from linearize.mixers import Mixer
from linearize.report import SiteReport
from linearize.tensorfile import Planned, Stored, read_header, write_tensors

ROW = "row"


class Checkpoints:
    """Nothing is read or written where `folder` is None, and nothing is made before there is something to keep."""

    def __init__(self, folder: str | Path | None, key: str) -> None:
        self._folder = Path(folder) / key[:16] if folder is not None else None

    def samples(self, draw: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The batches int64 [B, T] that `draw` gave before, or gives now.

        Raises:
            ArtifactError: they cannot be written.
        """
        found = self._read("samples")
        if found is not None:
            return [found[name] for name in sorted(found)]
        batches = draw()
        self._write("samples", {f"{index:06d}": batch for index, batch in enumerate(batches)}, {})
        return batches

    def restore(self, mixer: Mixer, row: SiteReport) -> bool:
        """Set a mixer and its row of the report to what was fitted before; False where nothing usable is there."""
        found = self._read(f"site-{row.site}")
        known = mixer.state_dict()
        if found is None or {name: t.shape for name, t in found.items()} != {n: t.shape for n, t in known.items()}:
            return False
        saved = self._row(f"site-{row.site}")
        if saved is None:
            return False
        mixer.load_state_dict(found)
        for field in ("error_start", "error_closed", "error_fitted", "parameters", "seconds"):
            setattr(row, field, getattr(saved, field))
        return True

    def keep(self, mixer: Mixer, row: SiteReport) -> None:
        """Remember a fitted site.

        Raises:
            ArtifactError: it cannot be written; what was kept before stays.
        """
        self._write(f"site-{row.site}", mixer.state_dict(), {ROW: row.model_dump_json()})

    def store(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        """Keep tensors and text under a name, for a stage that has its own form of them; no second copy is made.

        Raises:
            ArtifactError: it cannot be written; what was kept before stays.
        """
        file = self._file(name)
        if file is not None:
            _make_folder(file.parent)
            write_tensors(file, {key: Planned.of(tensor) for key, tensor in tensors.items()}, metadata)

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, str]] | None:
        """What `store` kept under that name; None where nothing usable is."""
        tensors, file = self._read(name), self._file(name)
        if tensors is None or file is None:
            return None
        with safe_open(file, framework="pt") as opened:
            return tensors, dict(opened.metadata() or {})

    @property
    def folder(self) -> Path | None:
        """Of this very fit; everything in it is of the same model, plan, data and seed."""
        return self._folder

    def stored(self, site: int) -> dict[str, Stored]:
        """Where the fitted mixer of a site is on disk, by the names of its state; {} where it was not kept."""
        file = self._file(f"site-{site}")
        return read_header(file)[0] if file is not None and file.is_file() else {}

    def _file(self, name: str) -> Path | None:
        return self._folder / f"{name}.safetensors" if self._folder is not None else None

    def _read(self, name: str) -> dict[str, Tensor] | None:
        file = self._file(name)
        if file is None or not file.is_file():
            return None
        try:
            with safe_open(file, framework="pt") as opened:
                return {key: opened.get_tensor(key) for key in opened.keys()}
        except (SafetensorError, OSError):
            return None

    def _row(self, name: str) -> SiteReport | None:
        try:
            with safe_open(self._file(name), framework="pt") as opened:
                return SiteReport.model_validate_json((opened.metadata() or {}).get(ROW, ""))
        except (SafetensorError, OSError, ValidationError):
            return None

    def _write(self, name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        file = self._file(name)
        if file is None:
            return
        _make_folder(file.parent)
        write_atomically(file, save({key: _own(tensor) for key, tensor in tensors.items()}, metadata))


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArtifactError(f"cannot keep what is fitted in {folder}: {error.strerror or error}") from error


def _own(tensor: Tensor) -> Tensor:
    """The same numbers in memory of their own, as safetensors wants them."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def forget(folder: str | Path) -> None:
    """Remove all that was kept, when the result is safe elsewhere."""
    shutil.rmtree(folder, ignore_errors=True)
