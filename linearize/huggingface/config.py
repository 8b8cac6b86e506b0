"""config.json of a compiled transformers model: the source's config, and what transformers' own tools read of it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig

from linearize.runtime.config_json import MODEL_TYPE


class LinearizedConfig(PreTrainedConfig):
    """`source_config` is the source's config as it was; its sizes and special tokens stand at the top level too.

    What the model computes is not in here but in linearize.json and graph.json beside it.
    """

    model_type = MODEL_TYPE
    has_no_defaults_at_init = True

    def __init__(self, source_config: dict[str, Any] | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.source_config = source_config or {}
