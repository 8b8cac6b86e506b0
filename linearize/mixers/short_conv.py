"""What DeltaNet, Gated DeltaNet and Mamba-2 have around their recurrence: short convolutions before, a gate behind.

y_i = sum_{n=0}^{c-1} w_n x_{i-n}        w [heads,d,c], w_0 = 1 and the others 0 at the start; x_i = 0 before the row
z_i = 2 sigmoid(x_i W_z)                 W_z [D,H dv] = 0 at the start: 1

Both start as the identity. The published layers have SiLU behind the convolutions and a norm before the gate; neither
is the identity at any setting, so both are left out.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.mixers.branches import Far, TwoBranches, only_real
from linearize.program import StateTensor
from linearize.spec import AttentionSpec


class ShortConv(nn.Module):
    """A causal convolution, channel by channel, for x [B,T,heads,d]; `size` c >= 2 tokens.

    State: the last c - 1 tokens. The caller zeroes masked tokens, so padding left of a row is the zero before it.
    """

    def __init__(self, name: str, heads: int, dim: int, size: int) -> None:
        super().__init__()
        if size < 2:
            raise ValueError(f"conv must be 0 (none) or at least 2 tokens, not {size}")
        self.name, self.size, self.tail = name, size, (size - 1, heads, dim)
        weight = torch.zeros(heads, dim, size)
        weight[..., 0] = 1.0
        self.weight = nn.Parameter(weight)

    def state(self) -> StateTensor:
        return StateTensor(f"conv_{self.name}", self.tail)

    def push(self, x: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """(y [B,T,heads,d], the new state [B,c-1,heads,d])."""
        y, new = torch.ops.linearize.short_conv.default(x, state, self.weight)
        return y, new


class ConvBranches(TwoBranches):
    """Subclasses write `mix`. Options: `window` (0: none), `sinks`; `conv`, tokens of the short convolutions (0: none);
    `output_gate`, whether there is z; `maps`.

    State: the delay line, s [G,d,dv] and with `conv` the last conv - 1 un-rotated queries, keys and values.
    """

    needs = ("query_unrotated", "key_unrotated", "hidden")

    def __init__(
        self, spec: AttentionSpec, window: int, sinks: int, conv: int, output_gate: bool, maps: bool
    ) -> None:
        super().__init__(spec, window, sinks, maps=maps, conv=conv, output_gate=output_gate)
        sizes = (spec.heads, spec.head_dim), (spec.kv_heads, spec.head_dim), (spec.kv_heads, spec.value_dim)
        self.convolutions = [ShortConv(name, *size, conv) for name, size in zip("qkv", sizes, strict=True) if conv]
        for convolution in self.convolutions:
            self.add_module(f"conv_{convolution.name}", convolution)
        self.gate = nn.Linear(spec.hidden_dim, spec.heads * spec.value_dim, bias=False) if output_gate else None
        if self.gate is not None:
            nn.init.zeros_(self.gate.weight)

    def mix(self, tokens: list[Tensor], hidden: Tensor, mask: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
        """(y [B,T,H,dv], new s) of the tokens' q, k, v, which are 0 where masked; hidden [B,T,D], mask [B,T]."""
        raise NotImplementedError

    def far_state(self) -> tuple[StateTensor, ...]:
        s = StateTensor("s", (self.spec.kv_heads, self.spec.head_dim, self.spec.value_dim))
        return (s, *(convolution.state() for convolution in self.convolutions))

    def far(self, x: dict[str, Tensor], state: tuple[Tensor, ...]) -> Far:
        hidden, mask = self.working(x["hidden"]), x["mask"]
        tokens = [only_real(self.working(x[name]), mask) for name in ("query_unrotated", "key_unrotated", "value")]
        lines = []
        for index, convolution in enumerate(self.convolutions):
            tokens[index], line = convolution.push(tokens[index], state[1 + index])
            lines.append(line)
        y, s = self.mix(tokens, hidden, mask, state[0])
        if self.gate is not None:
            y = y * (2.0 * torch.sigmoid(self.gate(hidden))).unflatten(-1, (self.spec.heads, self.spec.value_dim))
        return y, (s, *lines)


def from_hidden(spec: AttentionSpec, start: float) -> nn.Linear:
    """A number by token and kv head, W x + b: W [D,G] starts at 0, b at `start`."""
    linear = nn.Linear(spec.hidden_dim, spec.kv_heads)
    nn.init.zeros_(linear.weight)
    nn.init.constant_(linear.bias, start)
    return linear
