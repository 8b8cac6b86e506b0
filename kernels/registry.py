"""Which code runs an operator: kernels claim a call or decline it with a reason; unclaimed calls run the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from linearize.errors import LinearizeError
from linearize.ops import OPERATORS
from linearize.ops._backward import BACKWARDS, Backward, define_backward
from linearize.ops._library import LIBRARY

REFERENCE = "reference"
DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}

Check = Callable[..., str | None]
Call = Callable[..., Any]


def always(*args: Any, **kwargs: Any) -> None:
    """The check of a kernel that claims every call."""


@dataclass(frozen=True)
class Kernel:
    """One implementation of the operator named `op` on a device type ("cpu", "cuda").

    `check` takes the call's arguments and returns None when the kernel claims it, otherwise why it declines; `run`
    takes the same arguments, runs below autograd and returns the outputs. Higher priorities are asked first. `missing`
    says why the kernel cannot be used on this machine at all ("" = it can); a function where finding out takes work.
    """

    name: str
    op: str
    device: str
    priority: int
    check: Check
    run: Call
    missing: str | Callable[[], str] = ""

    def lacks(self) -> str:
        """What keeps the kernel from any call on this machine, "" where nothing does."""
        return self.missing if isinstance(self.missing, str) else self.missing()


@dataclass(frozen=True)
class Choice:
    """One call as it ran: the operator, its first tensor's shape, the kernel, and who declined it with which reason."""

    op: str
    shape: tuple[int, ...]
    kernel: str
    declined: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        why = "".join(f"; not {name}: {reason}" for name, reason in self.declined)
        return f"{self.op} {list(self.shape)}: {self.kernel}{why}"


_KERNELS: dict[tuple[str, str], tuple[Kernel, ...]] = {}
_BACKWARD_KERNELS: dict[tuple[str, str], Kernel] = {}
_INSTALLED: set[tuple[str, str]] = set()
_RECORDS: list[list[Choice]] = []


def register(kernel: Kernel) -> Kernel:
    """Add a kernel; it is used from the next call on."""
    if kernel.op not in OPERATORS:
        raise LinearizeError(f"kernel {kernel.name}: no operator {kernel.op}; known: {', '.join(OPERATORS)}")
    if kernel.device not in DISPATCH_KEYS:
        raise LinearizeError(f"kernel {kernel.name}: no device type {kernel.device}; known: {', '.join(DISPATCH_KEYS)}")
    others = [known for known in kernels_for(kernel.op, kernel.device) if known.name != kernel.name]
    key = (kernel.op, kernel.device)
    _KERNELS[key] = tuple(sorted([*others, kernel], key=lambda known: -known.priority))
    return kernel


def register_backward(kernel: Kernel) -> Kernel:
    """Let a kernel compute an operator's gradients; its `check` and `run` take (inputs, gradients of the outputs, which
    inputs need one, keywords). Where it declines, the streamed form is recomputed and differentiated."""
    operator = OPERATORS[kernel.op]
    if all(kernel.op != op for op, _ in BACKWARDS):
        define_backward(LIBRARY, kernel.op, str(operator.overload._schema), operator.streamed)
    _BACKWARD_KERNELS[kernel.op, kernel.device] = kernel
    claims = lambda *call: not kernel.lacks() and kernel.check(*call) is None  # noqa: E731
    BACKWARDS[kernel.op, kernel.device] = Backward(claims, kernel.run)
    return kernel


def kernels_for(op: str, device: str) -> tuple[Kernel, ...]:
    """The kernels of an operator on a device type, the one asked first in front."""
    return _KERNELS.get((op, device), ())


def choose(
    op: str, device: str, args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[Kernel | None, list[tuple[str, str]]]:
    """(the kernel that claims this call, or None for the reference; name and reason of those that declined)."""
    declined: list[tuple[str, str]] = []
    for kernel in kernels_for(op, device):
        reason = kernel.lacks() or kernel.check(*args, **kwargs)
        if reason is None or reason == "":
            return kernel, declined
        declined.append((kernel.name, reason))
    return None, declined


def explain(op: str, device: str) -> list[tuple[str, str]]:
    """(name, "available" or why not) of each kernel of an operator, the reference last; for `linearize doctor`."""
    backward = _BACKWARD_KERNELS.get((op, device))
    kernels = [*kernels_for(op, device), *([backward] if backward else [])]
    rows = [(kernel.name, kernel.lacks() or "available") for kernel in kernels]
    return [*rows, (REFERENCE, "available")]


def install() -> None:
    """Let the registry answer every operator on the devices that have kernels. Safe to call again."""
    for op, device in _KERNELS:
        if (op, device) not in _INSTALLED:
            LIBRARY.impl(op, _dispatcher(op, device), DISPATCH_KEYS[device])
            _INSTALLED.add((op, device))


@contextmanager
def recording() -> Iterator[list[Choice]]:
    """The list that every call of an operator adds its `Choice` to while the block runs."""
    record: list[Choice] = []
    _RECORDS.append(record)
    try:
        yield record
    finally:
        _RECORDS.remove(record)


def _dispatcher(op: str, device: str) -> Call:
    """The function behind an operator's dispatch key; short, since decoding calls it per layer and token."""
    key, reference = (op, device), OPERATORS[op].composed

    def dispatch(*args: Any, **kwargs: Any) -> Any:
        if _RECORDS:
            _record(op, device, args, kwargs)
        for kernel in _KERNELS[key]:
            if not kernel.lacks() and kernel.check(*args, **kwargs) is None:
                return kernel.run(*args, **kwargs)
        return reference(*args, **kwargs)

    return dispatch


def _record(op: str, device: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    kernel, declined = choose(op, device, args, kwargs)
    shape = tuple(next((value.shape for value in args if isinstance(value, Tensor)), ()))
    choice = Choice(op, shape, REFERENCE if kernel is None else kernel.name, tuple(declined))
    for record in _RECORDS:
        record.append(choice)
