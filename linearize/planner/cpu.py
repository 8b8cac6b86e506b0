"""The target `cpu`: this machine, timed for a few seconds and remembered.

Every operator that decides a decoding step is timed at a few sizes as a step finds it: behind a piece of other work, so
that neither its code nor its tensors are at hand (copies of them are taken in turn), and with its result kept until the
next time, so that memory is not simply reused. The fastest of several runs counts, as other work on the machine only
adds to it.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from linearize.calibration.keys import hash_of
from linearize.calibration.scores import cache_folder
from linearize.errors import ArtifactError
from linearize.files import write_atomically
from linearize.mixers import build_mixer
from linearize.planner.counting import Counting
from linearize.planner.reference import settle
from linearize.planner.target import FAR, NEAR, Points, Target
from linearize.spec import AttentionSpec, MaskSpec

VERSION = 5
COPIES = 16  # at most: of one tensor, taken in turn
FLOATS = (2**8, 2**14, 2**18, 2**20, 2**22)  # of a weight or a cache, at which operators are timed
SPEC = AttentionSpec(6, 2, 32, 32, hidden_dim=192, scale=0.17, mask=MaskSpec("causal"))
STEPS: dict[str, list[tuple[str, dict[str, Any]]]] = {  # operators of ours, and mixers of several sizes that run them
    "slots_chunk": [("slots", {"slots": size, "window": 32, "decay": 0.97}) for size in (16, 128, 1024, 4096)],
    "hybrid_ring": [("lolcats", {"window": window, "features": 64}) for window in (16, 64, 512, 4096)],
}
CONTEXTS = (64, 1024, 8192, 32768)


def cpu_target() -> Target:
    """Of this machine with torch's present number of threads; measured when nothing is remembered of them."""
    key = hash_of(f"{VERSION} {platform.processor()} {os.cpu_count()} {torch.__version__} {torch.get_num_threads()}")
    file = cache_folder("targets") / f"cpu-{key}.json"
    try:
        return Target.model_validate(json.loads(file.read_text()))
    except (OSError, ValueError):
        made = calibrate()
    with contextlib.suppress(OSError, ArtifactError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, made.model_dump_json(indent=1).encode())
    return made


@torch.no_grad()
def calibrate() -> Target:
    overhead, view = _overheads()
    known = Target(
        name="cpu", bandwidth=_bandwidth(), rate=_rate(), overhead=overhead, view_overhead=view,
        module_overhead=_module() * overhead / _hot(), node_overhead=_node() * overhead / _hot(),
        timed={"mm": _linear(), "cat": _cat(), "attention": _attention(), **_standard_attention()},
    )  # fmt: skip
    for name, mixers in STEPS.items():
        known = known.model_copy(update={"timed": {**known.timed, name: _steps(name, mixers, known)}})
    return settle(known, fastest)


def fastest(functions: Sequence[Callable[[], Any]], seconds: float = 0.2, before: Callable[[], Any] = int) -> float:
    """Mean over `functions`, which are alike and are called in turn, of the best time of each; at least three rounds.
    `before` runs before each call, outside of the time."""
    best, end, rounds = [float("inf")] * len(functions), time.perf_counter() + seconds, 0
    while rounds < 3 or time.perf_counter() < end:
        for at, function in enumerate(functions):
            before()
            started = time.perf_counter()
            function()
            best[at] = min(best[at], time.perf_counter() - started)
        rounds += 1
    return sum(best) / len(best)


def _timed(make: Callable[[], Callable[[], Any]], nbytes: int, swept: int = FAR) -> float:
    """Seconds of one of the functions that `make` gives, each over tensors of its own, `swept` bytes of them in all."""
    kept: dict[int, Any] = {}

    def keeping(at: int, function: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            kept[at] = function()

        return run

    count = max(1, min(COPIES, swept // max(nbytes, 1)))
    functions = [keeping(at, make()) for at in range(count)]
    return max(fastest(functions, before=Piece().run) - CLOCK, 1e-7)


CLOCK = 5e-8  # of reading the time twice


class Piece:
    """Some of what stands in every layer: a norm, a projection, a rotation, a gate. `run` gives the number of its
    operators that compute, and of those that only look at memory differently."""

    def __init__(self, width: int = 192) -> None:
        self.x, self.scale = torch.randn(1, 1, width), torch.ones(width)
        self.weight, self.angle = torch.randn(width, width), torch.randn(1, 1, 1, 32)

    def run(self) -> tuple[int, int]:
        x = self.x
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.scale
        y = nn.functional.linear(x, self.weight).reshape(1, 1, -1, 32).transpose(1, 2)
        turned = torch.cat([-y[..., 16:], y[..., :16]], -1)
        y = y * self.angle + turned * self.angle
        nn.functional.silu(y.transpose(1, 2).reshape(1, 1, -1)) + self.x
        return 14, 6


def _overheads() -> tuple[float, float]:
    """(of an operator that computes, of a view), from a piece of a step whose tensors are small."""
    pieces = [Piece() for _ in range(16)]
    computing, views = pieces[0].run()
    ratio = _view() / _hot()
    seconds = fastest([piece.run for piece in pieces], 0.5) - _linear_share()
    one = seconds / (computing - 1 + ratio * views)
    return one, one * ratio


def _linear_share() -> float:
    weight, x = torch.randn(192, 192), torch.randn(1, 1, 192)
    return fastest([lambda: nn.functional.linear(x, weight)] * 16)


def _counted(function: Callable[[], Any]) -> int:
    with Counting() as counting:
        function()
    return max(call.bytes for call in counting.calls)


def _points(makes: Sequence[Callable[[], Callable[[], Any]]]) -> Points:
    """(bytes, seconds near, seconds far) of the operator that each of `makes` gives, seconds never falling."""
    points: Points = []
    for make in makes:
        nbytes = _counted(make())
        points.append(_rising(points, nbytes, [_timed(make, nbytes, swept) for swept in (NEAR, FAR)]))
    return points


def _rising(points: Points, nbytes: int, seconds: list[float]) -> tuple[float, float, float]:
    """The next point: no operator is faster with more bytes, or with more memory in use around it."""
    near, far = points[-1][1:] if points else (0.0, 0.0)
    near = max(near, seconds[0])
    return float(nbytes), near, max(far, near, seconds[1])


def _product(size: int) -> Callable[[], Any]:
    x, y = torch.randn(size), torch.randn(size)
    return lambda: x * y


def _hot() -> float:
    """The same small product again and again: the least that an operator takes."""
    return fastest([_product(192)] * 100)


def _bandwidth() -> float:
    nbytes = 3 * 2**23
    return nbytes / _timed(lambda: _product(2**21), nbytes)


def _view() -> float:
    x = torch.randn(1, 1, 192)
    return fastest([lambda: x.transpose(1, 2)] * 100)


def _rate() -> float:
    x = torch.randn(512, 512)
    return 2 * 512**3 / fastest([lambda: x @ x])


def _linear() -> Points:
    def make(size: int) -> Callable[[], Any]:
        width = int(size**0.5)
        weight, x = torch.randn(width, width), torch.randn(1, 1, width)
        return lambda: nn.functional.linear(x, weight)

    return _points([lambda size=size: make(size) for size in FLOATS])  # type: ignore[misc]


def _cat() -> Points:
    def make(size: int) -> Callable[[], Any]:
        old, new = torch.randn(1, 2, size // 64, 32), torch.randn(1, 2, 1, 32)
        return lambda: torch.cat([old, new], 2)

    return _points([lambda size=size: make(size) for size in FLOATS])  # type: ignore[misc]


def _attention() -> Points:
    def make(context: int) -> Callable[[], Any]:
        q, seen = torch.randn(1, 6, 1, 32), torch.ones(1, 1, 1, context, dtype=torch.bool)
        k, v = torch.randn(1, 2, context, 32), torch.randn(1, 2, context, 32)
        return lambda: torch.ops.linearize.attention.default(q, k, v, seen, scale=0.17, causal=True)

    return _points([lambda context=context: make(context) for context in CONTEXTS])  # type: ignore[misc]


def _standard_attention() -> dict[str, Points]:
    """torch's own, under the name of the operator that it runs."""
    def make(context: int) -> Callable[[], Any]:
        q = torch.randn(1, 6, 1, 32)
        k, v = torch.randn(1, 6, context, 32), torch.randn(1, 6, context, 32)
        return lambda: nn.functional.scaled_dot_product_attention(q, k, v)

    with Counting() as counting:
        make(64)()
    return {counting.calls[-1].name: _points([lambda context=context: make(context) for context in CONTEXTS])}  # type: ignore[misc]


def _steps(name: str, mixers: Sequence[tuple[str, dict[str, Any]]], known: Target) -> Points:
    """One of our operators, by what is left of a mixer's step when its other operators are paid for."""
    points: Points = []
    for mixer, options in mixers:
        made = build_mixer(mixer, SPEC, options)
        tokens = _token()
        state = [tensor.zeros(1) for tensor in made.state()]
        with Counting() as counting:
            made(*tokens, *state)
        own = [call for call in counting.calls if call.name == name]
        others = known.seconds([call for call in counting.calls if call.name != name], graph=False)
        nbytes = own[0].bytes
        make = partial(_step, made, tokens, state)
        seconds = [max(_timed(make, nbytes, swept) - others, known.overhead) for swept in (NEAR, FAR)]
        points.append(_rising(points, nbytes, seconds))
    return points


def _step(mixer: nn.Module, tokens: list[Tensor], state: list[Tensor]) -> Callable[[], Any]:
    held = [tensor.clone() for tensor in state]
    return lambda: mixer(*tokens, *held)


def _token() -> list[Tensor]:
    q, k, v = (torch.randn(1, heads, 1, SPEC.head_dim) for heads in (SPEC.heads, SPEC.kv_heads, SPEC.kv_heads))
    return [q, k, v, torch.ones(1, 1, dtype=torch.bool), torch.full((1, 1), 777)]


class _Nothing(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x


def _node() -> float:
    """What an operator takes more when a compiled graph calls it by its overload."""
    x, y = torch.randn(192), torch.randn(192)
    return max(fastest([lambda: torch.ops.aten.mul.Tensor(x, y)] * 100) - _hot(), 0.0)


def _module() -> float:
    """Calling a module, without what it computes."""
    module, x = _Nothing(), torch.randn(4)
    return fastest([lambda: module(x)] * 100)

