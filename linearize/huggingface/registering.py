"""Tell transformers' Auto classes of the model type `linearized`. Called from `linearize._autoload`."""

from __future__ import annotations

from linearize.runtime.config_json import MODEL_TYPE


def register_config() -> None:
    from transformers import AutoConfig

    from linearize.huggingface.config import LinearizedConfig

    AutoConfig.register(MODEL_TYPE, LinearizedConfig, exist_ok=True)


def register_model() -> None:
    from transformers import AutoModelForCausalLM

    from linearize.huggingface.config import LinearizedConfig
    from linearize.huggingface.model import LinearizedForCausalLM

    register_config()
    AutoModelForCausalLM.register(LinearizedConfig, LinearizedForCausalLM, exist_ok=True)
