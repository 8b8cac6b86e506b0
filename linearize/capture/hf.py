"""What is particular to transformers: recognising its models, loading them, their tokenizers. Imported lazily."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from linearize.errors import ArtifactError, CaptureError

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt",
    "tokenizer.model", "added_tokens.json", "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def is_pretrained(model: nn.Module) -> bool:
    """Whether `model` is a transformers model, without importing transformers for one that is not."""
    transformers = sys.modules.get("transformers")
    return transformers is not None and isinstance(model, transformers.PreTrainedModel)


def check_decoder(model: Any) -> None:
    """Refuse what its own config calls an encoder-decoder.

    Raises:
        CaptureError: the model has an encoder, so token ids alone do not give next-token logits.
    """
    if getattr(model.config, "is_encoder_decoder", False):
        raise CaptureError(
            f"{type(model).__name__} is an encoder-decoder; linearize takes decoder-only language models"
        )


def config_dict(model: nn.Module) -> dict[str, Any] | None:
    return model.config.to_dict() if is_pretrained(model) else None  # type: ignore[union-attr,operator]


def load_model(name_or_path: str, *, trust_remote_code: bool = False) -> nn.Module:
    """A causal language model from a local directory or the hub, in the dtype its checkpoint states.

    Raises:
        ArtifactError: nothing loadable is there.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    path = Path(name_or_path)
    if path.is_dir() and not (path / "config.json").is_file():
        raise ArtifactError(f"{name_or_path} is a directory without config.json: not a transformers model")
    logging.disable_progress_bar()
    try:
        return AutoModelForCausalLM.from_pretrained(name_or_path, trust_remote_code=trust_remote_code).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"cannot load a causal language model from {name_or_path!r}: {first}") from error


def load_tokenizer(directory: str | Path) -> Any | None:
    """The tokenizer kept in `directory` (or on the hub under that id), or None where there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(directory))
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def tokenizer_files(model: nn.Module) -> dict[str, bytes]:
    """Contents of the tokenizer and generation files that came with a transformers model: from its directory, or from
    the hub's cache; the generation config as the model has it now."""
    name = getattr(getattr(model, "config", None), "_name_or_path", "") or ""
    found = {file: path for file in TOKENIZER_FILES if name and (path := _source_file(model, name, file)) is not None}
    files = {file: path.read_bytes() for file, path in found.items()}
    generation = getattr(model, "generation_config", None) if is_pretrained(model) else None
    if generation is not None:
        files["generation_config.json"] = (generation.to_json_string() + "\n").encode()
    return files


def _source_file(model: nn.Module, name: str, file: str) -> Path | None:
    """A file of the model's directory, or of its snapshot in the hub's cache; nothing is downloaded."""
    if Path(name).is_dir():
        return path if (path := Path(name) / file).is_file() else None
    if not is_pretrained(model):
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.utils import HFValidationError

    try:
        cached = try_to_load_from_cache(name, file, revision=getattr(model.config, "_commit_hash", None))  # type: ignore[union-attr,arg-type]
    except HFValidationError:
        return None
    return Path(cached) if isinstance(cached, str) else None


def skeleton(directory: str | Path) -> nn.Module:
    """The causal language model of a local directory with its parameters on the meta device, buffers as it makes them.

    Raises:
        ArtifactError: there is no such model, or its weights are quantised.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    try:
        config = AutoConfig.from_pretrained(str(directory))
        if getattr(config, "quantization_config", None) is not None:
            raise ArtifactError(f"{directory} holds quantised weights, which cannot be streamed; dequantise them first")
        with parameters_on_meta():
            model = AutoModelForCausalLM.from_config(config).eval()
        if Path(directory, "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(str(directory))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ArtifactError(f"cannot make a causal language model from {str(directory)!r}: {first}") from error
    model.config._name_or_path = str(directory)
    return model


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Every parameter that a module registers goes to the meta device at once: none is filled, none stays."""
    register = nn.Module.register_parameter

    def register_on_meta(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        register(self, name, param)

    nn.Module.register_parameter = register_on_meta  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def made_of_config(model_name: str, config: dict[str, Any] | None) -> nn.Module:
    """The source's model without weights, of a class that transformers has.

    Raises:
        ArtifactError: transformers has no such class, or does not take the config.
    """
    import transformers

    made = getattr(transformers, model_name, None)
    if config is None or not isinstance(made, type) or not issubclass(made, transformers.PreTrainedModel):
        raise ArtifactError(f"{model_name} is no model class of transformers")
    options = {key: value for key, value in config.items() if key != "model_type"}
    try:
        with torch.device("meta"):
            return made(transformers.AutoConfig.for_model(config["model_type"], **options)).eval()
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise ArtifactError(
            f"transformers {transformers.__version__} makes no {model_name} of the saved config: "
            f"{type(error).__name__}: {first}"
        ) from error
