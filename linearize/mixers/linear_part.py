"""The part of a mixer in which its output is linear: what ridge regression finds without a gradient step.

    y_h = sum_i w_ih x_ih               Weights: a number by term and head
    y_h = sum_i M_ih^T x_ih + c_h       HeadMaps: a matrix M [dv, dv] by term and head, and a shift

x_ih [B,T,H,dv] are the mixer's terms (its window's output, its far field's, ...). A map on a value is the same as that
map on what is summed of it, so HeadMaps hold every value and output map of a head. They cost dv^2 multiplications a
term, head and token, and no state.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class HeadMaps(nn.Module):
    """M [n,H,dv,dv] and c [H,dv]. Starts as multiples of the identity, one of `starts` for each of the n terms."""

    full = True

    def __init__(self, heads: int, dim: int, starts: list[float]) -> None:
        super().__init__()
        scales = torch.tensor(starts)[:, None, None, None]
        self.maps = nn.Parameter(scales * torch.eye(dim).repeat(len(starts), heads, 1, 1))
        self.shift = nn.Parameter(torch.zeros(heads, dim))

    @property
    def count(self) -> int:
        return len(self.maps)

    def forward(self, *terms: Tensor) -> Tensor:
        """n tensors [B,T,H,dv] -> [B,T,H,dv]."""
        y: Tensor = self.shift
        for index, term in enumerate(terms):
            y = y + torch.einsum("bthd,hde->bthe", term, self.maps[index])
        return y

    def write(self, maps: Tensor, shift: Tensor) -> None:
        """Set M [n,H,dv,dv] and c [H,dv]."""
        self.maps.copy_(maps)
        self.shift.copy_(shift)

    def read(self) -> tuple[Tensor, Tensor]:
        return self.maps.detach().clone(), self.shift.detach().clone()


class Weights:
    """The same interface over a mixer's parameters w_i [H], which stay where they are: multiples of the identity."""

    full = False

    def __init__(self, weights: list[nn.Parameter], dim: int) -> None:
        self.weights, self.dim = weights, dim

    @property
    def count(self) -> int:
        return len(self.weights)

    def write(self, maps: Tensor, shift: Tensor) -> None:
        """Takes w from the first entries of the diagonals; there is no shift."""
        for weight, term in zip(self.weights, maps, strict=True):
            weight.copy_(term[:, 0, 0])

    def read(self) -> tuple[Tensor, Tensor]:
        weights = torch.stack([weight.detach() for weight in self.weights])
        identity = torch.eye(self.dim, dtype=weights.dtype, device=weights.device)
        return weights[..., None, None] * identity, weights.new_zeros(weights.shape[1], self.dim)


LinearPart = HeadMaps | Weights
