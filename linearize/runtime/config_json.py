"""The config.json by which transformers' Auto classes find a compiled model. Pure data, no import."""

from __future__ import annotations

from typing import Any

MODEL_TYPE = "linearized"
ARCHITECTURE = "LinearizedForCausalLM"
CONFIG = "config.json"
CARRIED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
    "dtype", "tokenizer_class", "transformers_version",
)  # fmt: skip


def config_json(source_config: dict[str, Any]) -> dict[str, Any]:
    """`source_config` whole, and its usual fields (those of the text model, where it has several) at the top."""
    text = source_config.get("text_config")
    fields = {**(text if isinstance(text, dict) else {}), **source_config}
    carried = {key: fields[key] for key in CARRIED if fields.get(key) is not None}
    return {
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "source_model_type": source_config.get("model_type"),
        **carried,
        "source_config": source_config,
    }
