"""Where a compiled model is found, in which dtype, and on which device."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig

from linearize.errors import ArtifactError
from linearize.runtime.model import LinearizedModel

HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "revision", "token")


def as_directory(name: str | Path, kwargs: dict[str, Any]) -> Path:
    """A local directory as it is, a hub id after its download."""
    path = Path(name).expanduser()
    subfolder = kwargs.get("subfolder") or ""
    if not path.is_dir():
        from huggingface_hub import snapshot_download

        options = {key: kwargs[key] for key in HUB_OPTIONS if kwargs.get(key) is not None}
        try:
            path = Path(snapshot_download(str(name), **options))
        except Exception as error:
            raise ArtifactError(f"{name} is no directory, and could not be had from the hub: {error}") from error
    return path / subfolder


def check_dtype(compiled: LinearizedModel, wanted: Any) -> None:
    """A graph computes in the dtype that its source had.

    Raises:
        ArtifactError: another one is asked for.
    """
    found = {parameter.dtype for parameter in compiled.parameters() if parameter.is_floating_point()}
    if wanted in (None, "auto"):
        return
    dtype = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    if dtype not in found:
        raise ArtifactError(
            f"the model was compiled in {', '.join(str(one) for one in found)}; for {dtype} compile the source in it"
        )


def place(model: Any, device_map: Any) -> Any:
    """The whole model on one device: "auto" is the accelerator if there is one.

    Raises:
        ArtifactError: the map spreads the model over devices.
    """
    if device_map is None:
        return model
    if isinstance(device_map, dict):
        if len(set(device_map.values())) != 1:
            raise ArtifactError("a compiled graph runs on one device; give device_map one device")
        device_map = next(iter(device_map.values()))
    if device_map in ("auto", "balanced", "balanced_low_0", "sequential"):
        device_map = "cuda" if torch.cuda.is_available() else "cpu"
    moved: nn.Module = model.to(device_map)
    return moved


def generation_config_of(compiled: LinearizedModel) -> GenerationConfig | None:
    """The source's generation config, where it came with one."""
    content = compiled.files.get("generation_config.json")
    return GenerationConfig(**json.loads(content)) if content is not None else None
