"""LinearizedModel: what `compile` returns. The source's interface, plus a step with a state."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from linearize.errors import DataError, StateError
from linearize.plan import Plan
from linearize.program import POSITIONS, Program, StateTensor
from linearize.report import Report
from linearize.runtime.generate import Sampling, generate
from linearize.runtime.state import State
from linearize.runtime.tokens import check_tokens


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
        states = {str(node.target): node.meta["state"] for node in program.placeholders() if "state" in node.meta}
        self.state_specs: tuple[StateTensor, ...] = tuple(states.values())
        self._takes_positions = POSITIONS in program.input_names()

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
        ids = self._checked(input_ids)
        self._check_limit(ids.shape[1])
        state = State.empty(self.state_specs, ids.shape[0], self.device)
        mask = self._mask(ids, attention_mask, 0)
        positions = self._default_positions(mask) if position_ids is None else position_ids
        logits, state = self._run(ids, mask, positions, state)
        return LinearizedOutput(logits, state)

    def step(
        self, input_ids: Tensor, state: State | None = None, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, State]:
        """T >= 1 further tokens.

        Args:
            input_ids: int64 [B, T].
            state: what the last step returned; None starts a new sequence.
            attention_mask: [B, T] for these tokens, or [B, seen + T] for all so far; 0 at padding, which may only
                stand left of a row's tokens.

        Returns:
            (logits [B, T, V], the new state). A row's positions count its real tokens, so padding does not move them.

        Raises:
            StateError: the state is of another batch or model, the context limit of learned positions is passed, or
                an attention was left as it was, so that the graph has no memory of it.
            DataError: as `forward`.
        """
        ids = self._checked(input_ids)
        if self.program.stateless_reason:
            raise StateError(
                f"this model cannot run step by step: {self.program.stateless_reason}; call it on whole sequences"
            )
        if state is None:
            state = State.empty(self.state_specs, ids.shape[0], self.device)
        self._check_state(ids, state)
        mask = self._mask(ids, attention_mask, state.tokens)
        positions = (state["seen"].unsqueeze(1) + mask.cumsum(1) - 1).clamp_min(0)
        return self._run(ids, mask, positions, state)

    def _default_positions(self, mask: Tensor) -> Tensor:
        if self.program.padding_moves_positions:
            return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return (mask.cumsum(1) - 1).clamp_min(0)

    def _run(self, ids: Tensor, mask: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        inputs = [ids, mask, positions] if self._takes_positions else [ids, mask]
        logits, *tensors = self.graph_module(*inputs, *state.values())
        return logits, State(self.state_specs, tensors, state.tokens + ids.shape[1])

    def _checked(self, input_ids: Tensor) -> Tensor:
        check_tokens(input_ids, self.vocab_size)
        return input_ids.to(self.device, torch.int64)

    def _mask(self, ids: Tensor, mask: Tensor | None, seen: int) -> Tensor:
        if mask is None:
            return torch.ones_like(ids)
        mask = mask.to(ids.device, torch.int64)
        if mask.shape == (ids.shape[0], seen + ids.shape[1]):
            mask = mask[:, seen:]
        if mask.shape != ids.shape:
            raise DataError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}")
        return mask

    def _check_state(self, ids: Tensor, state: State) -> None:
        if state.specs != self.state_specs:
            raise StateError("the state belongs to another model; start from None")
        if state.batch != ids.shape[0]:
            raise StateError(f"the state has batch {state.batch}, the tokens {ids.shape[0]}; use State.select to match")
        self._check_limit(state.tokens + ids.shape[1])

    def _check_limit(self, tokens: int) -> None:
        limit = self.program.max_positions
        if limit is not None and tokens > limit:
            raise StateError(f"{tokens} tokens pass the source's {limit} learned positions; start a new sequence")

    def state_bytes(self, batch: int = 1, context: int = 0) -> int:
        """Bytes of the state for `batch` rows. `context` matters only where softmax layers were kept, whose cache
        grows with the tokens seen; without them the number is the same at any context."""
        return sum(spec.bytes(batch, context) for spec in self.state_specs)

    def generate(self, input_ids: Tensor, max_new_tokens: int = 20, **options: Any) -> Tensor:
        """Continue each row of int64 [B, T]; see `linearize.runtime.generate.generate` for the options.

        Returns:
            int64 [B, T + new]: prompt and continuation. Rows that ended are filled with the end token.
        """
        return generate(self, input_ids, max_new_tokens, Sampling(**options))

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write weights (safetensors), graph and plan (JSON), and the source's tokenizer files to a new directory.

        Raises:
            ArtifactError: the directory exists or cannot be written; nothing is left behind.
        """
        from linearize.runtime.saving import save

        return save(self, directory)
