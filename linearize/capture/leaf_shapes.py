"""What an opaque module returns, as a function of what it is called with; learned from runs at several shapes.

Every dim of every output is one of: constant, a dim of an input (or an integer argument), such a dim times or plus a
constant, the product of two. What follows none of these cannot be traced around.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from linearize.capture.recording import Call, TensorFact
from linearize.errors import CaptureError

Size = Any  # int or SymInt


@dataclass(frozen=True)
class Source:
    """A number that a call brings: dim `dim` of its input tensor `index`, or its argument `index` itself (dim None)."""

    index: int
    dim: int | None

    def read(self, inputs: Sequence[Any]) -> Size:
        value = inputs[self.index]
        return value if self.dim is None else value.shape[self.dim]


@dataclass(frozen=True)
class DimRule:
    """factor * product of sources + offset."""

    sources: tuple[Source, ...] = ()
    factor: int = 1
    offset: int = 0

    def size(self, inputs: Sequence[Any]) -> Size:
        value: Size = self.factor
        for source in self.sources:
            value = value * source.read(inputs)
        return value + self.offset


@dataclass(frozen=True)
class OutputRule:
    """One output tensor: the rules of its dims, dtype, device, order in memory."""

    dims: tuple[DimRule, ...]
    dtype: torch.dtype
    device: torch.device
    order: tuple[int, ...]

    def empty(self, inputs: Sequence[Any]) -> Tensor:
        sizes = [rule.size(inputs) for rule in self.dims]
        stored = torch.empty([sizes[dim] for dim in self.order], dtype=self.dtype, device=self.device)
        return stored.permute([self.order.index(dim) for dim in range(len(sizes))])


@dataclass(frozen=True)
class LeafShapes:
    """The shape function of one call of a leaf. Call it with the module's own arguments."""

    outputs: tuple[OutputRule | Any, ...]
    spec: pytree.TreeSpec

    def __call__(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        flat, _ = pytree.tree_flatten((tuple(args), dict(kwargs)))
        return self.unflatten(self.tensors(flat), lambda value: value)

    def tensors(self, flat_inputs: Sequence[Any]) -> list[Tensor]:
        """The output tensors, without values, from the flattened arguments."""
        return [rule.empty(flat_inputs) for rule in self.outputs if isinstance(rule, OutputRule)]

    def unflatten(self, tensors: Sequence[Any], constant: Callable[[Any], Any]) -> Any:
        """What the module returns, from its tensors (or what stands for them) in order."""
        rest = iter(tensors)
        flat = [next(rest) if isinstance(rule, OutputRule) else constant(rule) for rule in self.outputs]
        return pytree.tree_unflatten(flat, self.spec)


def learn_shapes(calls: Sequence[Call]) -> LeafShapes:
    """The shape function that fits one call of a module in several runs.

    Raises:
        CaptureError: none fits; its text is a clause that says which output or argument stands in the way.
    """
    first = calls[0]
    _check_alike(calls)
    outputs: list[OutputRule | Any] = []
    for position, fact in enumerate(first.outputs):
        alike = [call.outputs[position] for call in calls]
        if isinstance(fact, TensorFact):
            outputs.append(_learn_output(calls, position, alike))
        elif all(value == fact for value in alike):
            outputs.append(fact)
        else:
            raise CaptureError(f"its result {position} is a number that changes with the shape: {alike}")
    if not any(isinstance(rule, OutputRule) for rule in outputs):
        raise CaptureError("it returns no tensor")
    return LeafShapes(tuple(outputs), first.outputs_spec)


def _check_alike(calls: Sequence[Call]) -> None:
    first = calls[0]
    for call in calls:
        if call.written:
            raise CaptureError("it writes into the tensors that it is given")
        if call.inputs_spec != first.inputs_spec or call.outputs_spec != first.outputs_spec:
            raise CaptureError("it is called with, or returns, another structure at another shape")
    for value in (*first.inputs, *first.outputs):
        if not isinstance(value, Tensor | TensorFact) and not is_constant(value):
            raise CaptureError(f"a {type(value).__name__} is among its arguments or results, which no graph can hold")


def is_constant(value: Any) -> bool:
    """Whether a graph may hold `value` as it is."""
    return value is None or isinstance(
        value, bool | int | float | complex | str | torch.dtype | torch.device | torch.layout | torch.memory_format
    )


def _learn_output(calls: Sequence[Call], position: int, facts: Sequence[TensorFact]) -> OutputRule:
    first = facts[0]
    if any((len(fact.shape), fact.dtype) != (len(first.shape), first.dtype) for fact in facts):
        raise CaptureError(f"its output {position} changes rank or dtype with the shape")
    dims = []
    for dim in range(len(first.shape)):
        sizes = [fact.shape[dim] for fact in facts]
        rule = next((rule for rule in _candidates(calls, dim, sizes) if _fits(rule, calls, sizes)), None)
        if rule is None:
            raise CaptureError(f"dim {dim} of its output {position} is {sizes}, no simple function of its inputs' dims")
        dims.append(rule)
    return OutputRule(tuple(dims), first.dtype, first.device, first.order)


def _fits(rule: DimRule, calls: Sequence[Call], sizes: Sequence[int]) -> bool:
    return all(rule.size(call.inputs) == size for call, size in zip(calls, sizes, strict=True))


def _candidates(calls: Sequence[Call], dim: int, sizes: Sequence[int]) -> Iterator[DimRule]:
    """Simplest first; the same dim of an input before its other dims."""
    yield DimRule((), sizes[0])
    sources = sorted(_varying(calls), key=lambda source: source.dim != dim)
    yield from (DimRule((source,)) for source in sources)
    pairs = [(a, b) for i, a in enumerate(sources) for b in sources[i + 1 :]]
    yield from (DimRule(pair) for pair in pairs)
    for group in (*((source,) for source in sources), *pairs):
        base = DimRule(group).size(calls[0].inputs)
        if base and sizes[0] % base == 0:
            yield DimRule(group, sizes[0] // base)
        yield DimRule(group, 1, sizes[0] - base)


def _varying(calls: Sequence[Call]) -> list[Source]:
    """Dims and integers of the call that are not the same in every run, each number once."""
    found: dict[tuple[int, ...], Source] = {}
    result = []
    for index, value in enumerate(calls[0].inputs):
        if isinstance(value, Tensor):
            sources = [Source(index, dim) for dim in range(value.ndim)]
        else:
            sources = [Source(index, None)] if isinstance(value, int) and not isinstance(value, bool) else []
        for source in sources:
            numbers = tuple(int(source.read(call.inputs)) for call in calls)
            if len(set(numbers)) > 1 and (source.dim is not None or numbers not in found):
                found.setdefault(numbers, source)
                result.append(source)
    return result
