"""What recurrent mixers share: a window softmax beside a recurrence, mixed by two weights per head.

    y_i = alpha_h Ynear_i + beta_h Yfar_i
    Ynear_i = sum_{j in W(i) u S} e^{s_ij} v_j / sum_{j in W(i) u S} e^{s_ij},    s_ij = scale q_i.k_j, q, k rotated

W(i) the last `window` tokens, S the row's first `sinks`; Yfar [B,T,H,dv] is the subclass's recurrence. alpha starts
at 1 and beta at 0, so before fitting every mixer here is the window softmax; `prepare` then solves for both. With
`maps` both are matrices A_h, B_h [dv, dv], and a shift c_h is added (linear_part.py): y_i = A_h^T Ynear_i + B_h^T
Yfar_i + c_h.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from linearize.mixers.base import Mixer, tokens_first
from linearize.mixers.delay_line import DelayLine
from linearize.mixers.linear_part import HeadMaps, LinearPart, Weights
from linearize.program import StateTensor
from linearize.spec import AttentionSpec

START = "the teacher's softmax over the last `window` keys and the first `sinks`; 0 everywhere when `window` is 0"
Far = tuple[Tensor, tuple[Tensor, ...]]


class TwoBranches(Mixer):
    """Subclasses write `far_state` and `far`. With `window` = 0 there is no window, and y = beta_h Yfar."""

    starts_as = START
    fits = True

    def __init__(
        self, spec: AttentionSpec, window: int, sinks: int, near: float = 1.0, far: float = 0.0, maps: bool = False,
        **options: object,
    ) -> None:  # fmt: skip
        super().__init__(spec, window=window, sinks=sinks, maps=maps, **options)
        if window == 0 and sinks:
            raise ValueError("sinks belong to a window: without one (window = 0) there are none")
        self.line = DelayLine(spec, window, sinks) if window else None
        self.maps: HeadMaps | None = None
        if maps:
            starts = [float(near), float(far)] if window else [float(far)]
            self.maps = HeadMaps(spec.heads, spec.value_dim, starts)
            return
        if self.line is not None:
            self.alpha = nn.Parameter(torch.full((spec.heads,), float(near)))
        self.beta = nn.Parameter(torch.full((spec.heads,), float(far)))

    def far_state(self) -> tuple[StateTensor, ...]:
        raise NotImplementedError

    def far(self, x: dict[str, Tensor], state: tuple[Tensor, ...]) -> Far:
        """(Yfar [B,T,H,dv], new state). `x` holds query [B,T,H,d], key [B,T,G,d], value [B,T,G,dv], what `needs` lists
        (heads behind tokens too), mask bool [B,T]. Masked tokens must leave the state as it is."""
        raise NotImplementedError

    def state(self) -> tuple[StateTensor, ...]:
        return (*(self.line.state() if self.line is not None else ()), *self.far_state())

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        names = ("query", "key", "value", *self.needs, "mask", "positions")
        given, state = dict(zip(names, inputs, strict=False)), inputs[len(names) :]
        flat = ("hidden", "mask", "positions")
        x = {name: given[name] if name in flat else tokens_first(given[name]) for name in names}
        own = len(self.far_state())
        far, new = self.far(x, state[len(state) - own :])
        near, ring = self._near(x, state[: len(state) - own]) if self.line is not None else (None, ())
        return (tokens_first(self._mixed(near, far).to(given["query"].dtype)), *ring, *new)

    def _mixed(self, near: Tensor | None, far: Tensor) -> Tensor:
        """y [B,T,H,dv] of the branches."""
        if self.maps is not None:
            mixed: Tensor = self.maps(far) if near is None else self.maps(near.to(far.dtype), far)
            return mixed
        y = self.beta[:, None] * far
        return y if near is None else self.alpha[:, None] * near + y

    def _near(self, x: dict[str, Tensor], ring: tuple[Tensor, ...]) -> Far:
        assert self.line is not None
        tokens = (x["query"], x["key"], x["value"], x["mask"], x["positions"])
        near, line, _, _ = self.line.attend(tokens, ring)
        return near, line

    def working(self, x: Tensor) -> Tensor:
        """In the dtype of the mixer's own parameters (float32)."""
        return x.to(next(self.parameters()).dtype)

    def linear_part(self) -> LinearPart:
        if self.maps is not None:
            return self.maps
        weights = [self.beta] if self.line is None else [self.alpha, self.beta]
        return Weights(weights, self.spec.value_dim)

    def prepare(self, inputs: list[Tensor], target: Tensor) -> None:
        """alpha_h and beta_h by least squares, given the two branches."""
        solve_weights(self, inputs, target)


def linear_terms(mixer: Mixer, part: LinearPart, inputs: list[Tensor]) -> Tensor:
    """What the output is linear in, [n,B,H,T,dv]: the mixer run with one term alone, n times. `part` is left as it
    was."""
    maps, shift = part.read()
    identity = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device).expand_as(maps)
    terms = []
    for index in range(part.count):
        chosen = torch.arange(part.count, device=maps.device) == index
        part.write(identity * chosen[:, None, None, None], torch.zeros_like(shift))
        terms.append(mixer.run(inputs))
    part.write(maps, shift)
    return torch.stack(terms)


def solve_weights(mixer: Mixer, inputs: list[Tensor], target: Tensor) -> None:
    """Set the weight of every term and head to the least squares solution: the normal equations of its branches, damped
    by 1e-4 of their diagonal, as branches differ in size."""
    part = mixer.linear_part()
    assert part is not None
    x = linear_terms(mixer, part, inputs).double().movedim(0, -1).transpose(0, 1).flatten(1, -2)
    y = target.double().transpose(0, 1).flatten(1).unsqueeze(-1)
    gram = x.transpose(1, 2) @ x
    damping = torch.diag_embed(1e-4 * gram.diagonal(dim1=1, dim2=2) + torch.finfo(torch.float64).tiny)
    solution = torch.linalg.solve(gram + damping, x.transpose(1, 2) @ y)[..., 0]
    maps, shift = part.read()
    identity = torch.eye(maps.shape[-1], dtype=maps.dtype, device=maps.device)
    part.write(solution.T[..., None, None].to(maps.dtype) * identity, torch.zeros_like(shift))


def log_sigmoid(x: Tensor) -> Tensor:
    """As -softplus(-x): `logsigmoid` is exported as Log(Sigmoid(x)), which is -inf from x = -60 on."""
    return -torch.nn.functional.softplus(-x)


def only_real(x: Tensor, mask: Tensor) -> Tensor:
    """x [B,T,heads,d] with zeros at masked tokens, whatever stands there."""
    return torch.where(mask.unsqueeze(-1).unsqueeze(-1), x, torch.zeros_like(x))


def only_real_numbers(x: Tensor, mask: Tensor) -> Tensor:
    """The same for x [B,T,heads]."""
    return torch.where(mask.unsqueeze(-1), x, torch.zeros_like(x))
