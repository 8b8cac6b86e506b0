"""`linearize::short_conv`, a causal convolution of a few tokens, channel by channel, over the tokens before the call.

    y_i = sum_{n=0}^{c-1} w_n x_{i-n}

x [B,T,heads,d]; weight [heads,d,c], c >= 2, w_0 for the token itself; state [B,c-1,heads,d] the tokens before x, the
last one directly before it, 0 where there are none. y as x; the new state is the last c - 1 of state and x.
"""

from __future__ import annotations

import torch
from torch import Tensor

from linearize.ops._library import define_operator, require

SCHEMA = "short_conv(Tensor x, Tensor state, Tensor weight) -> (Tensor y, Tensor state)"


def short_conv_recurrence(x: Tensor, state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The truth: one token at a time."""
    outputs = []
    for t in range(x.shape[1]):
        known = torch.cat([state, x[:, t : t + 1]], dim=1)
        outputs.append(torch.einsum("bnhd,hdn->bhd", known.flip(1), weight.to(x.dtype)))
        state = known[:, 1:]
    return torch.stack(outputs, dim=1), state.clone()


def short_conv_decomposed(x: Tensor, state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Standard operators: one product a tap."""
    last = weight.shape[-1] - 1
    line = torch.cat([state, x], dim=1)
    y = weight[..., 0] * x
    for back in range(1, last + 1):
        y = y + weight[..., back] * line[:, last - back : -back]
    return y, line[:, -last:].contiguous()


def _fake(x: Tensor, state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    size = weight.shape[-1]
    require(size >= 2, "short_conv", f"weight holds {size} tokens, needs at least 2")
    require(state.shape[1] == size - 1, "short_conv", f"state holds {state.shape[1]} tokens, not {size - 1}")
    require(x.shape[2:] == weight.shape[:2] == state.shape[2:], "short_conv", "x, state and weight differ in channels")
    return x.new_empty(x.shape), state.new_empty(state.shape)


SHORT_CONV = define_operator(
    SCHEMA,
    fake=_fake,
    reference=short_conv_decomposed,
    recurrence=short_conv_recurrence,
    streamed=short_conv_decomposed,
)
short_conv = SHORT_CONV.overload
