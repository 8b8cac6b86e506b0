"""How a program's graph is called: checks, masks, positions, state. It holds no weights; `run` computes the graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearize.errors import DataError, StateError
from linearize.program import POSITIONS, Program, StateTensor
from linearize.runtime.state import State
from linearize.runtime.tokens import check_tokens

Run = Callable[..., Any]


class Engine:
    """The calls of one program.

    `run(input_ids, attention_mask, [position_ids,] *state) -> (logits [B, T, V], *new state)` is the program's graph,
    or anything that computes the same: the graph with modules in it, or one compiled for a shape.
    """

    def __init__(self, program: Program) -> None:
        states = {str(node.target): node.meta["state"] for node in program.placeholders() if "state" in node.meta}
        self.state_specs: tuple[StateTensor, ...] = tuple(states.values())
        self.takes_positions = POSITIONS in program.input_names()
        self.vocab_size, self.max_positions = program.vocab_size, program.max_positions
        self.stateless_reason = program.stateless_reason
        self.padding_moves_positions = program.padding_moves_positions

    @property
    def grows(self) -> bool:
        """Whether a kept softmax layer's cache grows with the tokens seen."""
        return any(spec.grows is not None for spec in self.state_specs)

    def whole(
        self, run: Run, device: torch.device, input_ids: Tensor, mask: Tensor | None, positions: Tensor | None
    ) -> tuple[Tensor, State]:
        """A whole sequence from an empty state, positions as the source would number them."""
        ids = self.checked(input_ids, device)
        self.check_limit(ids.shape[1])
        mask = self.mask(ids, mask, 0)
        positions = self._default_positions(mask) if positions is None else positions
        return self.call(run, ids, mask, positions, self.empty(ids.shape[0], device))

    def step(
        self, run: Run, device: torch.device, input_ids: Tensor, state: State | None, mask: Tensor | None
    ) -> tuple[Tensor, State]:
        """T >= 1 further tokens, checked; see `LinearizedModel.step`."""
        ids = self.checked(input_ids, device)
        self.check_stateful()
        return self.advance(run, ids, self.empty(ids.shape[0], device) if state is None else state, mask)

    def advance(self, run: Run, ids: Tensor, state: State, mask: Tensor | None = None) -> tuple[Tensor, State]:
        """`step` for token ids that are known to be in the vocabulary: nothing here waits for the device."""
        self.check_state(ids, state)
        if mask is None and ids.shape[1] == 1:
            return self.call(run, ids, torch.ones_like(ids), state["seen"].unsqueeze(1), state)
        mask = self.mask(ids, mask, state.tokens)
        positions = (state["seen"].unsqueeze(1) + mask.cumsum(1) - 1).clamp_min(0)
        return self.call(run, ids, mask, positions, state)

    def call(self, run: Run, ids: Tensor, mask: Tensor, positions: Tensor, state: State) -> tuple[Tensor, State]:
        inputs = [ids, mask, positions] if self.takes_positions else [ids, mask]
        logits, *tensors = run(*inputs, *state.values())
        return logits, State(self.state_specs, tensors, state.tokens + ids.shape[1])

    def empty(self, batch: int, device: torch.device) -> State:
        return State.empty(self.state_specs, batch, device)

    def checked(self, input_ids: Tensor, device: torch.device) -> Tensor:
        check_tokens(input_ids, self.vocab_size)
        return input_ids.to(device, torch.int64)

    def mask(self, ids: Tensor, mask: Tensor | None, seen: int) -> Tensor:
        """int64 [B, T] of these tokens, cut out of one for all so far."""
        if mask is None:
            return torch.ones_like(ids)
        mask = mask.to(ids.device, torch.int64)
        if mask.shape == (ids.shape[0], seen + ids.shape[1]):
            mask = mask[:, seen:]
        if mask.shape != ids.shape:
            raise DataError(f"attention_mask has shape {list(mask.shape)}, input_ids {list(ids.shape)}")
        return mask

    def check_stateful(self) -> None:
        if self.stateless_reason:
            raise StateError(
                f"this model cannot run step by step: {self.stateless_reason}; call it on whole sequences"
            )

    def check_state(self, ids: Tensor, state: State) -> None:
        if state.specs != self.state_specs:
            raise StateError("the state belongs to another model; start from None")
        if state.batch != ids.shape[0]:
            raise StateError(f"the state has batch {state.batch}, the tokens {ids.shape[0]}; use State.select to match")
        self.check_limit(state.tokens + ids.shape[1])

    def check_limit(self, tokens: int) -> None:
        limit = self.max_positions
        if limit is not None and tokens > limit:
            raise StateError(f"{tokens} tokens pass the source's {limit} learned positions; start a new sequence")

    def _default_positions(self, mask: Tensor) -> Tensor:
        if self.padding_moves_positions:
            return torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return (mask.cumsum(1) - 1).clamp_min(0)
