"""LinearizedForCausalLM: a compiled model with transformers' interface."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from transformers import Cache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.pytorch_utils import Conv1D

from linearize.errors import ArtifactError, DataError, StateError
from linearize.huggingface.cache import StateCache
from linearize.huggingface.config import LinearizedConfig
from linearize.huggingface.loading import as_directory, check_dtype, generation_config_of, place
from linearize.passes.lower.raise_linears import RaiseLinears
from linearize.pipeline import run_pipeline
from linearize.rewriting.editor import retarget
from linearize.runtime.config_json import config_json
from linearize.runtime.engine import Engine
from linearize.runtime.generate import prompt_pieces
from linearize.runtime.model import LinearizedModel
from linearize.runtime.prompt_graph import PromptGraph
from linearize.runtime.saving import save_over
from linearize.runtime.state import State

CACHES = (None, "dynamic", "offloaded")


class LinearizedForCausalLM(PreTrainedModel, GenerationMixin):
    """Shares its parameters with the LinearizedModel that it was made of (`compiled`).

    Linear layers and embeddings are modules under the source's names, so adapters find them, and `state_dict()` has the
    source's keys and those of the mixers (`linearize_mixers.*`).
    """

    config_class = LinearizedConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _is_stateful = True
    _tied_weights_keys: dict[str, str] = {}  # noqa: RUF012
    _supports_sdpa = True  # of the softmax layers that were kept; nothing to choose
    compiled: LinearizedModel
    raised: fx.GraphModule

    def __init__(self, config: LinearizedConfig, compiled: LinearizedModel | None = None) -> None:
        if compiled is None:
            raise ArtifactError(
                "a linearized model is no config alone: use LinearizedForCausalLM.from_pretrained(directory), "
                "linearize.compile(source).to_transformers(), or linearize.load(directory).to_transformers()"
            )
        super().__init__(config)
        linears = RaiseLinears(lambda out, into: Conv1D(out, into))
        raised = run_pipeline(compiled.program, [linears], "structure")
        self._adopt(raised.module)
        object.__setattr__(self, "compiled", compiled)  # not a submodule: its parameters are ours
        object.__setattr__(self, "raised", raised.module)  # whose code we run, and whose parameters are ours
        self.prompt_graph = PromptGraph(compiled.program, linears)
        self.engine = Engine(raised)
        self.post_init()
        self.all_tied_weights_keys = tied_names(self)
        found = generation_config_of(compiled)
        if found is not None:
            self.generation_config = found

    def _adopt(self, module: nn.Module) -> None:
        """Take over the graph's parameters and modules: its code then runs on us, adapters included."""
        for name, parameter in module._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in module._buffers.items():
            self.register_buffer(name, buffer, name not in module._non_persistent_buffers_set)
        for name, child in module._modules.items():
            self.add_module(name, child)

    def _graph(self, *inputs: Tensor) -> Any:
        return type(self.raised).forward(self, *inputs)  # type: ignore[arg-type]

    def _prompt(self, *inputs: Tensor) -> Any:
        return self.prompt_graph(self, *inputs)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        before = self.device
        super()._apply(fn, recurse)
        if self.device != before:
            retarget(self.raised, self.device)
            self.prompt_graph.to(self.device)
        return self

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Logits [B, T, V] of int64 [B, T], with the loss of `labels` (shifted inside), and the StateCache.

        Without `past_key_values`: a whole sequence, positions as the source numbers them. With them: a continuation,
        padding only left of a row's tokens, positions counted by the state.

        Raises:
            DataError: inputs that a graph over token ids cannot take, or outputs that it does not have.
            StateError: a cache of another model, or a model that cannot run step by step.
        """
        refuse_unknown(kwargs)
        if input_ids is None:
            raise DataError("a linearized model starts at token ids; inputs_embeds are not taken")
        if past_key_values is not None and not isinstance(past_key_values, StateCache):
            raise StateError(f"the cache is a {type(past_key_values).__name__}; pass None or a StateCache")
        use_cache = self._wants_cache(use_cache)
        cache = past_key_values if past_key_values is not None or not use_cache else StateCache()
        if past_key_values is None:
            run = self._prompt if isinstance(logits_to_keep, int) and logits_to_keep == 1 else self._graph
            logits, state = self.engine.whole(run, self.device, input_ids, attention_mask, position_ids)
            logits = kept(logits, logits_to_keep)
        else:
            logits, state = self._continue(input_ids, past_key_values, attention_mask, logits_to_keep)
        if cache is not None:
            cache.state = state
            if cache.offloading:
                cache.offload()
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=logits.shape[-1], **kwargs)
        output = CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=cache)
        wants_dict = self.config.return_dict if return_dict is None else return_dict
        return output if wants_dict else output.to_tuple()

    def _wants_cache(self, use_cache: bool | None) -> bool:
        if self.engine.stateless_reason:
            return False
        return not self.training if use_cache is None else use_cache

    def _continue(
        self, input_ids: Tensor, cache: StateCache, mask: Tensor | None, keep: int | Tensor
    ) -> tuple[Tensor, State]:
        """Further tokens; a long prompt in pieces, so that memory does not grow with it."""
        self.engine.check_stateful()
        ids = input_ids.to(self.device) if cache.state is not None else self.engine.checked(input_ids, self.device)
        state = cache.state.to(self.device) if cache.state is not None else self.engine.empty(ids.shape[0], self.device)
        whole = self.engine.mask(ids, mask, state.tokens) if mask is not None else None
        last_only = isinstance(keep, int) and keep == 1 and ids.shape[1] > 1
        run = self._prompt if last_only else self._graph
        batch, length = ids.shape
        pieces = prompt_pieces(length, batch, self.prompt_graph.vocab_size) if last_only else [slice(None)]
        for piece in pieces:
            part = whole[:, piece] if whole is not None else None
            logits, state = self.engine.advance(run, ids[:, piece], state, part)
        return kept(logits, keep), state

    def _prepare_cache_for_generation(  # type: ignore[override]
        self, generation_config: Any, model_kwargs: dict[str, Any], *_: Any, **__: Any
    ) -> None:
        """Called by `generate`: the state is the cache, whatever its size."""
        wanted = generation_config.cache_implementation
        if wanted not in CACHES:
            raise StateError(f"cache_implementation {wanted!r} is for key-value caches; drop it or use 'offloaded'")
        if self.engine.stateless_reason:
            model_kwargs["use_cache"] = generation_config.use_cache = False  # every step runs the whole sequence
        elif generation_config.use_cache is not False and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = StateCache(offloading=wanted == "offloaded")

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls, pretrained_model_name_or_path: str | Path, *_: Any, **kwargs: Any
    ) -> Any:
        """What `save_pretrained` wrote, from a directory or the hub. Nothing in it is executed.

        Raises:
            ArtifactError: it is not such a directory, or a dtype is asked for that it was not compiled in.
        """
        from linearize.api import load

        compiled = load(as_directory(pretrained_model_name_or_path, kwargs))
        check_dtype(compiled, kwargs.get("dtype", kwargs.get("torch_dtype")))
        model = place(cls.of(compiled), kwargs.get("device_map")).eval()
        model.name_or_path = model.config._name_or_path = str(pretrained_model_name_or_path)
        if kwargs.get("generation_config") is not None:
            model.generation_config = kwargs["generation_config"]
        return (model, empty_loading_info()) if kwargs.get("output_loading_info") else model

    @classmethod
    def of(cls, compiled: LinearizedModel) -> LinearizedForCausalLM:
        """A compiled model as a transformers model, over the same parameters."""
        return cls(LinearizedConfig(**config_json(compiled.config or {})), compiled).train(compiled.training)

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Write what `linearize.load` and `from_pretrained` read, over what such a directory held before.

        With an adapter of transformers' own PEFT integration loaded, only the adapter is written, as everywhere.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            super().save_pretrained(save_directory, *args, **kwargs)
            return
        if not kwargs.get("is_main_process", True):
            return
        given = kwargs.get("state_dict")
        state_dict = {**self.state_dict(), **(given or {})}
        written = (self.generation_config.to_json_string() + "\n").encode()
        self.compiled.files = {**self.compiled.files, "generation_config.json": written}
        save_over(self.compiled, save_directory, state_dict)
        if kwargs.get("push_to_hub"):
            self.push_to_hub(kwargs.get("repo_id") or Path(save_directory).name)  # type: ignore[arg-type]

    def get_input_embeddings(self) -> nn.Module:
        """The embedding of the token ids."""
        found = [module for module in self.modules() if isinstance(module, nn.Embedding)]
        own = [module for module in found if module.num_embeddings >= (self.engine.vocab_size or 0)]
        if not own:
            raise NotImplementedError("the embedding of this model is no table that could be found")
        return own[0]

    def get_output_embeddings(self) -> nn.Module | None:
        """The linear layer that makes the logits, or None where they are made in another way."""
        found = [module for module in self.modules() if isinstance(module, nn.Linear)]
        last = found[-1] if found else None
        return last if last is not None and last.out_features == self.engine.vocab_size else None

    def resize_token_embeddings(  # type: ignore[override]
        self, new_num_tokens: int | None = None, *_: Any, **__: Any
    ) -> nn.Module:
        """Raises DataError for another size: resize the source, then compile it."""
        if new_num_tokens not in (None, self.engine.vocab_size):
            raise DataError(f"the graph is for {self.engine.vocab_size} tokens; resize the source and compile it again")
        return self.get_input_embeddings()

    def init_weights(self) -> None:
        """Nothing: the weights are there."""

    def tie_weights(self, *_: Any, **__: Any) -> None:
        """Nothing: tied weights are one parameter."""


def kept(logits: Tensor, keep: int | Tensor) -> Tensor:
    """The last `keep` positions of [B, T, V] (0 for all), or those of an index tensor."""
    if isinstance(keep, Tensor):
        return logits[:, keep]
    return logits[:, -keep:] if keep else logits


def refuse_unknown(kwargs: dict[str, Any]) -> None:
    """Drop what means nothing here; raise DataError for what was asked for and cannot be had."""
    for name in ("inputs_embeds", "output_attentions", "output_hidden_states", "cache_position", "token_type_ids"):
        value = kwargs.pop(name, None)
        if value is not None and value is not False and name not in ("cache_position", "token_type_ids"):
            raise DataError(f"{name} is not available: a compiled graph goes from token ids to logits")


def tied_names(model: nn.Module) -> dict[str, str]:
    """Other names of a parameter -> its first name."""
    first: dict[int, str] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    return {name: first[id(p)] for name, p in named if first.setdefault(id(p), name) != name}


def empty_loading_info() -> dict[str, list[str]]:
    return {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": [], "error_msgs": []}


