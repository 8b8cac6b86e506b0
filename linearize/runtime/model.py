"""LinearizedModel: what `compile` returns. The source's interface, plus a step with a state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from linearize.errors import ArtifactError
from linearize.plan import Plan
from linearize.program import Program, StateTensor
from linearize.report import Report
from linearize.rewriting.editor import retarget
from linearize.runtime.compiled_step import CompiledStep
from linearize.runtime.engine import Engine
from linearize.runtime.generate import Sampling, generate, prefill
from linearize.runtime.prompt_graph import PromptGraph
from linearize.runtime.state import State

if TYPE_CHECKING:
    from linearize.huggingface.model import LinearizedForCausalLM


@dataclass
class LinearizedOutput:
    """What forward returns: `logits` float [B, T, V], and the `state` after the last token."""

    logits: Tensor
    state: State


class LinearizedModel(nn.Module):
    """A compiled model. One graph serves prefill and decode: T tokens and a state in, logits and a state out.

    Attributes:
        program: the lowered graph that runs, with the history of every pass.
        plan: what each site became, and why.
        report: errors per layer, kernels, state bytes, seconds.
        source: the rewritten program before lowering, which is what is saved.
    """

    def __init__(self, program: Program, source: Program, plan: Plan, report: Report, files: dict[str, bytes]) -> None:
        super().__init__()
        self.graph_module = program.module
        self.program, self.source, self.plan, self.report = program, source, plan, report
        self.files = files
        self.engine = Engine(program)
        self.prompt_graph = PromptGraph(program)
        self.compiled_step: CompiledStep | None = None

    @property
    def state_specs(self) -> tuple[StateTensor, ...]:
        return self.engine.state_specs

    @property
    def vocab_size(self) -> int | None:
        return self.program.vocab_size

    @property
    def device(self) -> torch.device:
        return self.program.device

    @property
    def config(self) -> dict[str, Any] | None:
        """The source's transformers config as a dict, or None for a plain module."""
        return self.program.source_config

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None
    ) -> LinearizedOutput:
        """The whole sequence from an empty state, as the source model would be called.

        Args:
            input_ids: int64 [B, T].
            attention_mask: int64 or bool [B, T], 0 at padding; None for none.
            position_ids: int64 [B, T]; None for what the source makes of None. Only for sources that take them.

        Raises:
            DataError: token ids that are not int [B, T] or not in the vocabulary, or a mask of another shape.
            StateError: more tokens than the source has learned positions.
        """
        logits, state = self.engine.whole(self.graph_module, self.device, input_ids, attention_mask, position_ids)
        return LinearizedOutput(logits, state)

    def step(
        self,
        input_ids: Tensor,
        state: State | None = None,
        attention_mask: Tensor | None = None,
        logits_to_keep: int = 0,
    ) -> tuple[Tensor, State]:
        """T >= 1 further tokens.

        Args:
            input_ids: int64 [B, T].
            state: what the last step returned; None starts a new sequence.
            attention_mask: [B, T] for these tokens, or [B, seen + T] for all so far; 0 at padding, which may only
                stand left of a row's tokens.
            logits_to_keep: 0 for the logits of all T tokens, else of so many last ones. With 1, what of a prompt serves
                the other tokens' logits only is not computed.

        Returns:
            (logits [B, T, V] or [B, logits_to_keep, V], the new state). A row's positions count its real tokens, so
            padding does not move them.

        Raises:
            StateError: the state is of another batch or model, the context limit of learned positions is passed, or
                an attention was left as it was, so that the graph has no memory of it.
            DataError: as `forward`.
        """
        run = self._run_prompt if logits_to_keep == 1 and input_ids.shape[-1] > 1 else self._run
        logits, state = self.engine.step(run, self.device, input_ids, state, attention_mask)
        return logits[:, -logits_to_keep:], state

    def compile_step(self) -> LinearizedModel:
        """Have inductor compile the decode step once per batch size, at the first step of that size (some seconds, kept
        in torch's cache on disk), as a CUDA graph on a GPU. Tokens stay the same. Where it cannot be compiled steps run
        as before and `compiled_step.reason` says why."""
        self.compiled_step = CompiledStep(self.graph_module, self.engine.grows)
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> LinearizedModel:
        """`to`, `cuda`, ...: the constants that the graph makes move along with the parameters."""
        before = self.device
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.device != before:
            retarget(self.graph_module, self.device)
            self.prompt_graph.to(self.device)
            if self.compiled_step is not None:
                self.compile_step()
        return self

    def _run(self, *inputs: Tensor) -> Any:
        return self.graph_module(*inputs) if self.compiled_step is None else self.compiled_step(*inputs)

    def _run_prompt(self, *inputs: Tensor) -> Any:
        return self.prompt_graph(self.graph_module, *inputs)

    def decode(self, tokens: Tensor, state: State) -> tuple[Tensor, State]:
        """One further token a row, int64 [B] -> (logits [B, V], the new state), without checking that the ids are in
        the vocabulary: nothing waits for the device."""
        logits, state = self.engine.advance(self._run, tokens.unsqueeze(1), state)
        return logits[:, -1], state

    @torch.no_grad()
    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, state: State | None = None
    ) -> tuple[Tensor, State]:
        """A prompt int64 [B, T] of any length, in pieces, so that its memory does not grow with it; behind what `state`
        has seen. Returns (logits [B, V] after the last token, the state): keep the state to fork the prompt."""
        return prefill(self, input_ids, attention_mask, state=state)

    def load_state(self, path: str | Path) -> State:
        """What `State.save` wrote. Raises StateError where it is not of this model."""
        return State.load(path, self.state_specs, self.device)

    def state_bytes(self, batch: int = 1, context: int = 0) -> int:
        """Bytes of the state for `batch` rows. `context` matters only where softmax layers were kept, whose cache
        grows with the tokens seen; without them the number is the same at any context."""
        return sum(spec.bytes(batch, context) for spec in self.state_specs)

    def generate(
        self, input_ids: Tensor, max_new_tokens: int = 20, *, state: State | None = None, **options: Any
    ) -> Tensor:
        """Continue each row of int64 [B, T]; see `linearize.runtime.generate.Sampling` for the options. With a `state`
        the tokens are those that come after what it has seen.

        Returns:
            int64 [B, T + new]: prompt and continuation. Rows that ended are filled with the end token.
        """
        return generate(self, input_ids, max_new_tokens, Sampling(**options), state)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write weights (safetensors), graph and plan (JSON), and the source's tokenizer files to a new directory.

        Raises:
            ArtifactError: the directory exists or cannot be written; nothing is left behind.
        """
        from linearize.runtime.saving import save

        return save(self, directory)

    def to_transformers(self) -> LinearizedForCausalLM:
        """This model as a `transformers.PreTrainedModel`, over the same parameters: its `generate` (beams, streaming,
        processors), pipelines, Trainer and PEFT.

        Raises:
            ArtifactError: the source was not a transformers model.
        """
        if self.config is None:
            raise ArtifactError(
                f"{self.program.model_name} is not from transformers, so it has no config to go by; call "
                "generate and step on it as it is"
            )
        from linearize.huggingface.model import LinearizedForCausalLM

        return LinearizedForCausalLM.of(self)
