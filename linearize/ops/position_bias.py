"""What positions alone add to the scores of `linearize::attention`: ALiBi, and which keys are of the query's chunk.

    ALiBi (Press et al. 2022):  bias_hij = slope_h (p_j - p_i)       p counts a row's real tokens
    chunks of c:                seen_ij  = floor(p_j / c) == floor(p_i / c)

Plain torch operators, traced where they are called. The causal mask is the attention's own.
"""

from __future__ import annotations

import torch
from torch import Tensor


def position_bias(seen: Tensor, new: Tensor, chunk: int, slopes: Tensor | None, *, from_first_token: bool) -> Tensor:
    """The `bias` of `linearize::attention` for the last T of S tokens.

    Args:
        seen: bool [B, S], True at real tokens.
        new: bool [B, T], its last columns.
        chunk: length of a chunk, 0 for none.
        slopes: float32 [H], or None.
        from_first_token: chunks are counted over real tokens; over columns otherwise.

    Returns:
        bool [B, 1, T, S], True may be attended, without slopes; with them float32 [B, H, T, S], -inf where not.
    """
    ranks = torch.cumsum(seen.to(torch.int64), 1) - 1
    visible = seen.unsqueeze(1).unsqueeze(1)
    if chunk:
        places = ranks if from_first_token else torch.cumsum(torch.ones_like(ranks), 1) - 1
        number = torch.div(places, chunk, rounding_mode="floor")
        visible = visible & (number.unsqueeze(1) == _last(number, new).unsqueeze(2)).unsqueeze(1)
    if slopes is None:
        return visible
    distance = (ranks.unsqueeze(1) - _last(ranks, new).unsqueeze(2)).unsqueeze(1)
    bias = slopes.reshape(1, -1, 1, 1) * distance.to(torch.float32)
    return bias.masked_fill(~visible, float("-inf"))


def _last(whole: Tensor, new: Tensor) -> Tensor:
    """The last T of S columns; T >= 1."""
    return whole[:, whole.shape[1] - new.shape[1] :]
