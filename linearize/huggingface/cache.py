"""The recurrent state as a transformers `Cache`, so that beams, batches and prompts are handled as for any model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from linearize.errors import StateError
from linearize.runtime.state import State


class StateCache(Cache):
    """Holds the model's one `state` (None before the first token). A forward that is given the cache replaces it.

    A state cannot forget: `crop` refuses. Copies are cheap and of one size, so keep `copy.deepcopy(cache)` (or
    `cache.state`, which is immutable) at the point to return to. `offloading`: it waits on the CPU between calls.
    """

    def __init__(self, state: State | None = None, offloading: bool = False) -> None:
        super().__init__(layers=[])
        self.offloading, self.state = offloading, state

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, padding included."""
        return self.state.tokens if self.state is not None else 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.state is not None:
            self.state = self.state.take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            self.state = self.state.repeat(repeats)

    def crop(self, tokens_to_remove: int) -> None:
        """Raises StateError: what a fixed-size state has taken in cannot be taken out again."""
        if tokens_to_remove:
            raise StateError(
                f"a recurrent state cannot forget its last {abs(tokens_to_remove)} tokens; keep copy.deepcopy(cache) "
                "before they are fed, and go on from that (assisted generation needs a cache that can be cropped)"
            )

    def reset(self) -> None:
        self.state = None

    def offload(self, layer_idx: int = 0, only_non_sliding: bool = True) -> None:
        """Move the state to the CPU; the next forward brings it back."""
        if self.state is not None:
            self.state = self.state.to("cpu")

    def prefetch(self, layer_idx: int = 0, only_non_sliding: bool = True, device: torch.device | None = None) -> None:
        if self.state is not None and device is not None:
            self.state = self.state.to(device)

    @property
    def batch_size(self) -> int | None:  # type: ignore[override]
        return self.state.batch if self.state is not None else None

    @property
    def is_initialized(self) -> bool:
        return self.state is not None

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def nbytes(self) -> int:
        """Bytes of the state now."""
        return self.state.nbytes if self.state is not None else 0

    def __deepcopy__(self, memo: dict[int, Any]) -> StateCache:
        return StateCache(self.state, self.offloading)  # a State never changes

    def __repr__(self) -> str:
        return f"StateCache({self.state})"
