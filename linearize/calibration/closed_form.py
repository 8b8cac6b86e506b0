"""The linear part of a mixer by ridge regression on Gram matrices: one pass over the data, no gradient step.

    y_h ~ W_h^T x_h,   x_h = [term 1 ; .. ; term n ; 1] in R^K, K = n dv + 1         one problem a head
    G = sum x x^T [K,K],  C = sum x y^T [K,dv],  P = sum |y|^2                       over all tokens, in float64
    W = W_0 + (G + D)^{-1} (C - G W_0),   D = lambda diag(mean of G's diagonal within each term)
    error(W) = P - 2 tr(W^T C) + tr(W^T G W)

Every fourth batch is kept out of the first solve; each head takes the lambda with the smallest error on those, W_0
itself (lambda = infinity) among them, and is then solved on everything. W_0 is the best number a term and head, or what
the mixer has already, whichever is closer. Moments add: over batches, and over processes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.calibration.parallel import summed
from linearize.calibration.teacher import TeacherStream
from linearize.mixers import Mixer
from linearize.mixers.branches import linear_terms
from linearize.mixers.linear_part import LinearPart
from linearize.spec import Site

DAMPINGS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, float("inf"))
EVERY = 4  # batches, of which the last chooses the damping


@dataclass
class Moments:
    """gram [H,K,K], cross [H,K,dv] and power [H] of x [H,N,K] and y [H,N,dv], float64; `terms` is n."""

    gram: Tensor
    cross: Tensor
    power: Tensor
    terms: int

    @staticmethod
    def of(x: Tensor, y: Tensor, terms: int) -> Moments:
        return Moments(x.mT @ x, x.mT @ y, y.square().sum((1, 2)), terms)

    def __add__(self, other: Moments) -> Moments:
        return Moments(self.gram + other.gram, self.cross + other.cross, self.power + other.power, self.terms)

    def zeros(self) -> Moments:
        return Moments(self.gram * 0, self.cross * 0, self.power * 0, self.terms)

    def errors(self, maps: Tensor) -> Tensor:
        """Summed squared error [H] of W [H,K,dv]."""
        return self.power + (maps * (self.gram @ maps - 2 * self.cross)).sum((1, 2))

    def solve(self, start: Tensor, damping: float) -> Tensor:
        """W [H,K,dv] of the module docstring, from W_0 = `start`."""
        if damping == float("inf"):
            return start
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        means = self._by_term(diagonal)
        floor = 1e-12 * diagonal.mean(1, keepdim=True) + torch.finfo(diagonal.dtype).tiny
        ridge = torch.diag_embed(damping * means + floor)
        return start + torch.linalg.solve(self.gram + ridge, self.cross - self.gram @ start)

    def _by_term(self, diagonal: Tensor) -> Tensor:
        """[H,K]: in place of every entry the mean over its term."""
        own = diagonal[:, :-1].unflatten(1, (self.terms, -1)).mean(-1, keepdim=True)
        size = (diagonal.shape[1] - 1) // self.terms
        return torch.cat([own.expand(-1, -1, size).flatten(1), diagonal[:, -1:]], dim=1)

    def numbers(self) -> Moments:
        """The same of one number a term and head: gram [H,n+1,n+1], the shift's entry empty."""
        size, terms = self.cross.shape[-1], self.terms
        blocks = self.gram[:, :-1, :-1].unflatten(2, (terms, size)).unflatten(1, (terms, size))
        gram = blocks.diagonal(dim1=2, dim2=4).sum(-1)
        cross = self.cross[:, :-1].unflatten(1, (terms, size)).diagonal(dim1=2, dim2=3).sum(-1)
        pad = torch.nn.functional.pad
        return Moments(pad(gram, (0, 1, 0, 1)), pad(cross, (0, 1)).unsqueeze(-1), self.power, terms)


def fit_linear(mixer: Mixer, stream: TeacherStream, site: Site) -> None:
    """Solve for the linear part of `mixer` (of every part of it that has one) on all batches of the stream. Left as it
    is where there is none, or where a term is not finite."""
    fitted, chosen_on = _moments(mixer, stream, site)
    parts = [own for own, _, _ in mixer.parts_on(*stream.site_values(site, mixer.needs, 0))]
    for part, train, held in zip(parts, fitted, chosen_on, strict=True):
        linear = part.linear_part()
        if linear is not None and bool(torch.isfinite(train.gram + held.gram).all()):
            write(linear, solved(train, held, read(linear), linear.full))


def _moments(mixer: Mixer, stream: TeacherStream, site: Site) -> tuple[list[Moments], list[Moments]]:
    """(to fit on, to choose on), one for every part."""
    fitted: list[Moments] = []
    chosen_on: list[Moments] = []
    count = stream.total
    for batch in range(len(stream.batches)):
        inputs, target = stream.site_values(site, mixer.needs, batch)
        pairs = [_of_part(*part) for part in mixer.parts_on(inputs, target)]
        if count == 1:
            cut = pairs[0][0].shape[1] * 3 // 4 if pairs else 0
            fitted = [Moments.of(x[:, :cut], y[:, :cut], terms) for x, y, terms in pairs]
            chosen_on = [Moments.of(x[:, cut:], y[:, cut:], terms) for x, y, terms in pairs]
            break
        new = [Moments.of(*pair) for pair in pairs]
        place = stream.place(batch)
        if place % EVERY == EVERY - 1 or (place == count - 1 and count < EVERY):
            chosen_on = _plus(chosen_on, new)
        else:
            fitted = _plus(fitted, new)
    return _of_all(fitted or [one.zeros() for one in chosen_on]), _of_all(chosen_on or [one.zeros() for one in fitted])


def _of_all(sums: list[Moments]) -> list[Moments]:
    """Summed over all processes."""
    found = [summed([one.gram, one.cross, one.power]) for one in sums]
    return [Moments(gram, cross, power, one.terms) for (gram, cross, power), one in zip(found, sums, strict=True)]


def _plus(sums: list[Moments], new: list[Moments]) -> list[Moments]:
    return [one + other for one, other in zip(sums, new, strict=True)] if sums else new


def _of_part(mixer: Mixer, inputs: list[Tensor], target: Tensor) -> tuple[Tensor, Tensor, int]:
    """x [H,N,K], y [H,N,dv] and n."""
    part = mixer.linear_part()
    assert part is not None
    terms = wide(linear_terms(mixer, part, inputs))  # [n,B,H,T,dv]
    x = terms.permute(2, 1, 3, 0, 4).flatten(3).flatten(1, 2)
    y = wide(target).transpose(0, 1).flatten(1, 2)
    return torch.cat([x, torch.ones_like(x[..., :1])], dim=-1), y, part.count


def solved(train: Moments, held: Moments, now: Tensor, full: bool) -> Tensor:
    """W [H,K,dv]: numbers a term, or whole maps around the better of those and `now`."""
    numbers = _expanded(_best(train.numbers(), held.numbers(), torch.zeros_like(train.numbers().cross)), now)
    if not full:
        return numbers
    start = torch.where((held.errors(now) < held.errors(numbers))[:, None, None], now, numbers)
    return _best(train, held, start)


def _best(train: Moments, held: Moments, start: Tensor) -> Tensor:
    """Each head's lambda by the error on `held`, then solved on both."""
    errors = torch.stack([held.errors(train.solve(start, damping)) for damping in DAMPINGS])
    whole = train + held
    solutions = torch.stack([whole.solve(start, damping) for damping in DAMPINGS])
    best = errors.nan_to_num(nan=float("inf")).argmin(0)
    return solutions[best, torch.arange(len(best), device=best.device)]


def _expanded(numbers: Tensor, like: Tensor) -> Tensor:
    """[H,n+1,1] -> [H,n dv+1,dv]: multiples of the identity, no shift."""
    identity = torch.eye(like.shape[-1], dtype=like.dtype, device=like.device)
    maps = (numbers[:, :-1, :, None] * identity).flatten(1, 2)
    return torch.cat([maps, torch.zeros_like(like[:, :1])], dim=1)


def read(part: LinearPart) -> Tensor:
    """W [H,n dv+1,dv] in float64."""
    maps, shift = part.read()
    return wide(torch.cat([maps.transpose(0, 1).flatten(1, 2), shift.unsqueeze(1)], dim=1))


def write(part: LinearPart, solution: Tensor) -> None:
    maps, shift = part.read()
    found = solution.to(maps)
    part.write(found[:, :-1].unflatten(1, (part.count, -1)).transpose(0, 1), found[:, -1].to(shift))


def wide(x: Tensor) -> Tensor:
    """In float64, on the CPU where the device has none."""
    return (x.cpu() if x.device.type == "mps" else x).double()
