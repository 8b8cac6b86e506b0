"""Saving a compiled model whose weights stay on disk: copied from the source's files tensor by tensor."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from linearize.errors import ArtifactError
from linearize.files import check_new_directory
from linearize.program import MIXERS
from linearize.runtime.model import LinearizedModel
from linearize.runtime.saving import WEIGHTS, check_savable, contents_beside, named_tensors
from linearize.tensorfile import Planned, bytes_of, write_tensors

MixerTensor = Callable[[int, str], Tensor]


def save_from_disk(model: LinearizedModel, directory: Path, mixer_tensor: MixerTensor, staging: Path) -> Path:
    """What `LinearizedModel.save_pretrained` writes. `mixer_tensor(site, name)` gives the mixers' parameters; `staging`
    is filled first, on the same disk, and renamed, so that the directory is there complete or not at all.

    Raises:
        ArtifactError: it cannot be written; nothing is left in `directory`.
    """
    check_savable(model)
    check_new_directory(directory)
    tensors, shared = _planned(model, mixer_tensor)
    shutil.rmtree(staging, ignore_errors=True)  # of a run that was cut off while it wrote
    try:
        staging.mkdir(parents=True)
        write_tensors(staging / WEIGHTS, tensors, {"format": "pt"})
        for name, content in contents_beside(model, shared).items():
            (staging / name).write_bytes(content)
        directory.parent.mkdir(parents=True, exist_ok=True)
        os.replace(staging, directory)
    except OSError as error:
        raise ArtifactError(f"cannot write {directory}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return directory


def _planned(model: LinearizedModel, mixer_tensor: MixerTensor) -> tuple[dict[str, Planned], dict[str, str]]:
    """(what is written under which name, other names of the same tensor -> that name)."""
    weights = model.source.weights
    assert weights is not None
    first: dict[object, str] = {}
    planned: dict[str, Planned] = {}
    shared: dict[str, str] = {}
    for name, tensor in named_tensors(model.source.module):
        stored = weights.stored.get(name)
        key: object = (stored.path, stored.start) if stored is not None and name not in weights.changes else name
        if key in first and bytes_of(tensor.dtype, tensor.shape):
            shared[name] = first[key]
            continue
        first[key] = name
        planned[name] = Planned(tensor.dtype, tuple(tensor.shape), _maker(model, name, tensor, mixer_tensor))
    return planned, shared


def _maker(model: LinearizedModel, name: str, tensor: Tensor, mixer_tensor: MixerTensor) -> Callable[[], Tensor]:
    weights = model.source.weights
    assert weights is not None
    if name.startswith(f"{MIXERS}."):
        site, _, own = name.removeprefix(f"{MIXERS}.").partition(".")
        return lambda: mixer_tensor(int(site), own).to(tensor.dtype)
    if tensor.is_meta:
        return lambda: weights.get(name)
    return lambda: tensor
