"""MODEL on the command line: `demo`, a local directory, python `module:factory`, or a hub id."""

from __future__ import annotations

import importlib
import json
import os
import re
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

from linearize.errors import ArtifactError, CaptureError, DataError

if TYPE_CHECKING:
    from torch import nn

    from linearize.calibration.sources import Source, TextRows
    from linearize.recipe import Fit

DEMO = "demo"
MODEL_HELP = (
    "[b]demo[/b] (the embedded model), a directory with a transformers model, a hub id, "
    "or python [b]module:factory[/b] that makes an nn.Module."
)
FACTORY = re.compile(r"^[A-Za-z_][\w.]*:[A-Za-z_]\w*$")
COMPILED = "linearize.json"
SCORED = 4096  # tokens that a recipe may want for ranking layers, though it fits none


def load_source(name: str) -> nn.Module:
    """The model that MODEL names, in eval mode.

    Raises:
        ArtifactError: nothing loadable is there.
        CaptureError: `module:factory` does not give a module.
    """
    from linearize.capture import hf

    location = locate(name)
    if location is None:
        return make_module(name)
    if Path(location, COMPILED).is_file():
        raise ArtifactError(f"{name} is compiled already: generate from it or export it, or give the source model")
    if not Path(location).is_dir() and not hub_answers():
        os.environ["HF_HUB_OFFLINE"] = "1"  # a copy in the cache still loads, and nothing is retried for half a minute
    try:
        return hf.load_model(location)
    except ArtifactError:
        if os.environ.get("HF_HUB_OFFLINE") != "1" or Path(location).is_dir():
            raise
        raise ArtifactError(f"no directory {name} is here, and the hub cannot be reached to look for that id") from None


def hub_answers() -> bool:
    """Whether the hub's name resolves; taken as given behind a proxy."""
    if any(os.environ.get(key) for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    host = urlparse(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True


def locate(name: str) -> str | None:
    """The directory or hub id to load from; None for `module:factory`.

    Raises:
        ArtifactError: it is a path, and no directory is there.
    """
    if not name.strip():
        raise ArtifactError("the model's name is empty; give `demo`, a directory, a hub id or module:factory")
    if name == DEMO:
        from linearize.api import demo_model_dir

        return str(demo_model_dir())
    path = Path(name).expanduser()
    if path.is_dir():
        return str(path)
    if path.exists():
        raise ArtifactError(f"{name} is a file; give the directory that holds config.json and the weights")
    if FACTORY.match(name):
        return None
    if name.startswith((".", "/", "~")) or name.endswith("/") or name.count("/") > 1:
        raise ArtifactError(f"there is no directory {name}")
    return name


def make_module(name: str) -> nn.Module:
    """Import `module:factory`, the current directory last on the path, and call the factory if it is no module yet.

    Raises:
        CaptureError: it cannot be imported or called, or what it gives is no nn.Module.
    """
    from torch import nn

    module_name, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        factory = getattr(importlib.import_module(module_name), attribute)
        model = factory if isinstance(factory, nn.Module) else factory()
    except AttributeError as error:
        raise CaptureError(f"{name}: {error}") from error
    except ImportError as error:
        raise CaptureError(
            f"{name}: cannot import {module_name} (the current directory is searched too): {error}"
        ) from error
    except Exception as error:
        raise CaptureError(f"{name}: making the model failed with {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise CaptureError(f"{name} gives a {type(model).__name__}, not a torch.nn.Module")
    return model.eval()


def read_calibration(
    sources: list[Source], name: str, config: dict[str, Any], fit: Fit, tokens: int | None
) -> TextRows:
    """Text as batches int64 [B, T] for `linearize.compile`, read with the tokenizer of MODEL; `config` is the model's.

    Raises:
        DataError: the model has no tokenizer, or a source is unusable.
    """
    from linearize.calibration.sources import read_mixture
    from linearize.capture import hf

    location = locate(name)
    tokenizer = hf.load_tokenizer(location) if location is not None else None
    if tokenizer is None:
        raise DataError(
            f"{name} has no tokenizer to read {sources[0].path} with; call linearize.compile with token ids instead"
        )
    wanted = max(fit.tokens if tokens is None else tokens, SCORED)
    limit, vocabulary = limit_of(config), config.get("vocab_size")
    length = min(fit.length, limit or fit.length)
    known = vocabulary if isinstance(vocabulary, int) else None
    return read_mixture(sources, tokenizer, length, wanted, fit.batch, limit, known)


def context_limit(model: nn.Module) -> int | None:
    """Longest context that the model's config states, or None."""
    return limit_of(config_of(model))


def config_of(model: nn.Module | str) -> dict[str, Any]:
    """The config of a model, or of a directory whose model is not loaded; {} for one without.

    Raises:
        ArtifactError: the directory has no config.json that can be read.
    """
    if not isinstance(model, str):
        return getattr(getattr(model, "config", None), "__dict__", {})
    try:
        found: dict[str, Any] = json.loads(Path(model, "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{model} has no config.json that can be read: not a transformers model") from error
    return found


def limit_of(config: dict[str, Any]) -> int | None:
    found = [config.get(key) for key in ("max_position_embeddings", "n_positions", "max_seq_len")]
    return next((value for value in found if isinstance(value, int) and value > 1), None)
