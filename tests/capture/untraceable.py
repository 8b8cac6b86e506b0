"""Plain models with a part that torch.export cannot follow, one kind of reason each."""
# mypy: disable-error-code="no-untyped-def,misc"

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from tests import zoo
from tests.plain_models import WIDTH, FusedSDPA, LearnedPositions, Projected


class With(LearnedPositions):
    """An ordinary decoder with one more module behind its blocks, called as `call(module, x)`."""

    def __init__(self, extra: nn.Module, call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> None:
        super().__init__(FusedSDPA)
        self.extra = nn.ModuleList([extra])
        self.call = call or (lambda module, x: x + module(x))

    def forward(self, tokens):
        x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(self.call(self.extra[0], x)))


def with_extra(extra: Callable[[], nn.Module], call: Callable[[nn.Module, Tensor], Tensor] | None = None) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return zoo.loud(With(extra(), call))


class Experts(nn.Module):
    """Each expert takes the tokens routed to it: as many as there are, which only their values say."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weight, chosen = torch.softmax(self.router(flat), -1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            row, rank = (chosen == number).nonzero(as_tuple=True)
            if len(row):
                out.index_add_(0, row, expert(flat[row]) * weight[row, rank, None])
        return out.view(x.shape)


class Recurrence(nn.Module):
    """A loop over the tokens, unrolled while tracing."""

    def __init__(self) -> None:
        super().__init__()
        self.decay, self.mix = nn.Parameter(torch.zeros(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        state, outputs = torch.zeros_like(x[:, 0]), []
        for step in range(x.shape[1]):
            state = torch.sigmoid(self.decay) * state + x[:, step]
            outputs.append(state)
        return self.mix(torch.stack(outputs, 1))


class ChunkedScan(nn.Module):
    """One cumulative sum a chunk of 32, in a loop over the chunks: traced at 13 tokens it is one chunk, for ever."""

    def forward(self, x):
        carry, outputs = 0.0, []
        for number in range((x.shape[1] + 31) // 32):
            part = x[:, 32 * number : 32 * (number + 1)].cumsum(1) + carry
            carry = 0.5 * part[:, -1:]
            outputs.append(part)
        return torch.cat(outputs, 1)


class Numpy(nn.Module):
    """Leaves torch in the middle."""

    def forward(self, x):
        return torch.from_numpy(x.detach().numpy().clip(-1.0, 1.0))


class DynamicAngles(nn.Module):
    """Angles that shrink once the largest position passes a limit (dynamic NTK)."""

    def forward(self, x, positions):
        limit = 64
        base = 100.0 if int(positions.max()) < limit else 1000.0
        angles = positions[..., None].float() / base ** torch.linspace(0, 1, 16)
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)


def add_angles(module: nn.Module, x: Tensor) -> Tensor:
    positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
    cos, sin = module(x, positions=positions)
    return x + torch.cat((cos, sin), -1)


@dataclass
class Pair:
    first: Tensor
    count: int


class ManyShapes(nn.Module):
    """Takes and returns every kind of thing: keywords, None, constants, a length, a list, a dict, a dataclass."""

    def forward(self, x, length, *, parts, mask=None, scale=1.0, dtype=torch.float32):
        assert mask is None
        if float(x.detach().abs().sum()) < 0:
            x = x * 0
        flat = (x * scale).reshape(-1, x.shape[-1])
        rows = torch.arange(length, dtype=dtype)
        return {"pair": [flat, None], "more": (rows, {"sum": parts[0] + parts[1]}, 7)}


def use_many(module: nn.Module, x: Tensor) -> Tensor:
    found = module(x, x.shape[1], parts=[x, 2 * x], scale=0.5)
    rows, sums, seven = found["more"]
    return found["pair"][0].view(x.shape) + rows[:, None] + sums["sum"] * seven


class AttentionByValue(Projected):
    """An attention that looks at its values."""

    def forward(self, x):
        q, k, v = self.heads(x)
        if float(q.abs().max()) > 1e9:
            q = q / 2
        return self.merge(torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))


class Nonzero(nn.Module):
    """Returns as many rows as the values say."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.looks = looks

    def forward(self, x):
        rows = (x > 0).nonzero()[:, 0]
        if self.looks and float(x.sum()) > 1e9:
            return rows[:1]
        return rows


def scale_by_rows(module: nn.Module, x: Tensor) -> Tensor:
    return x * (1 + 0 * module(x).sum())


class Noisy(nn.Module):
    def forward(self, x):
        return x + float(x.sum() * 0) + torch.rand(x.shape)


class Remembers(nn.Module):
    """Goes on from the state that it kept, unless somebody else has taken it away."""

    def __init__(self) -> None:
        super().__init__()
        self.state = None

    def forward(self, x):
        start = torch.zeros_like(x[:, 0]) if self.state is None else self.state
        self.state = x[:, -1]
        return x + 0 * start[:, None] * float(x.sum())


class Resets(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Remembers()

    def forward(self, x):
        self.inner.state = None
        return self.inner(x)


class InPlace(nn.Module):
    """Changes the tensor that it was given."""

    def forward(self, x):
        x.mul_(2.0 if float(x.sum()) > -1e9 else 1.0)
        return x


class Caching(nn.Module):
    """Keeps what it computed, in an attribute, in a dict and in an object that hang on it."""

    def __init__(self, fails: bool) -> None:
        super().__init__()
        self.fails, self.last, self.kept = fails, None, {}
        self.holder = type("Holder", (), {})()
        self.register_buffer("calls", torch.zeros(()), persistent=False)

    def forward(self, x):
        self.last = self.kept["x"] = self.holder.x = x
        if self.fails and float(x.sum()) > 1e9:
            return x * 2
        return x


class LoopInAttention(Projected):
    """Queries one by one: as many SDPA calls as tokens."""

    def forward(self, x):
        q, k, v = self.heads(x)
        rows = [
            torch.nn.functional.scaled_dot_product_attention(q[:, :, t : t + 1], k[:, :, : t + 1], v[:, :, : t + 1])
            for t in range(x.shape[1])
        ]
        return self.merge(torch.cat(rows, 2))


