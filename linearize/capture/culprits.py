"""Which module keeps a model from being traced: read off the traceback, or found by tracing modules on their own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.capture.probing import first_line, quiet_export, relative_difference, why_untraced
from linearize.capture.recording import Call

TOLERANCE = 1e-4


def on_traceback(error: BaseException, model: nn.Module) -> list[str]:
    """Names of the model's modules in which `error` was raised, innermost first, without the model itself.

    An elementary module of torch (a Linear) is never to blame for what it was handed, a recurrent one may be.
    """
    names = {id(module): name for name, module in model.named_modules()}
    found: list[str] = []
    for cause in _causes(error):
        trace = cause.__traceback__
        inner: list[str] = []
        while trace is not None:
            name = names.get(id(trace.tb_frame.f_locals.get("self")))
            if name and name not in inner:
                inner.insert(0, name)
            trace = trace.tb_next
        if len(inner) > len(found):
            found = inner
    return [name for name in found if not is_elementary(model.get_submodule(name))]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def is_elementary(module: nn.Module) -> bool:
    if isinstance(module, nn.RNNBase) or any(True for _ in module.children()):
        return False
    return type(module).__module__.startswith("torch.nn")


def called_children(model: nn.Module, name: str, called: set[str]) -> list[str]:
    """The nearest modules below `name` that are called; lists of modules are looked into."""
    result = []
    for child, module in model.get_submodule(name).named_children():
        path = f"{name}.{child}" if name else child
        if path in called:
            result.append(path)
        elif not is_elementary(module):
            result += called_children(model, path, called)
    return result


def structure(module: nn.Module) -> tuple[tuple[str, type], ...]:
    """What two modules have in common that are the same layer of a model."""
    return tuple((name, type(part)) for name, part in module.named_modules())


def alike(model: nn.Module, name: str) -> list[str]:
    """`name` and the other modules of the model with its structure: what cannot be traced in one cannot in all."""
    wanted = structure(model.get_submodule(name))
    return [other for other, module in model.named_modules() if other and structure(module) == wanted]


class Alone(nn.Module):
    """One call of a module as a function of its tensors alone, for tracing it by itself."""

    def __init__(self, module: nn.Module, call: Call) -> None:
        super().__init__()
        self.module = module
        self._spec, self._inputs = call.inputs_spec, call.inputs

    def forward(self, *tensors: Tensor) -> list[Tensor]:
        rest = iter(tensors)
        flat = [next(rest) if isinstance(value, Tensor) else value for value in self._inputs]
        args, kwargs = pytree.tree_unflatten(flat, self._spec)
        output = pytree.tree_flatten(self.module(*args, **kwargs))[0]
        return [value for value in output if isinstance(value, Tensor)]


def why_not_alone(module: nn.Module, calls: Sequence[Call]) -> str:
    """Why a module cannot be traced by itself, from its calls at several shapes; '' where it can."""
    first = calls[0]
    tensors = [[tensor.clone() for tensor in call.tensors()] for call in calls]
    ranks = [[tensor.ndim for tensor in group] for group in tensors]
    if any(call.inputs_spec != first.inputs_spec for call in calls) or not tensors[0]:
        return ""
    if any(rank != ranks[0] for rank in ranks):
        return ""  # an activation that is given a state in one call and scores in another: no call stands for all
    dims = tuple(
        {d: torch.export.Dim.DYNAMIC for d in range(t.ndim) if len({group[i].shape[d] for group in tensors}) > 1}
        for i, t in enumerate(tensors[0])
    )
    alone = Alone(module, first)
    try:
        with quiet_export():
            exported = torch.export.export(alone, tuple(tensors[0]), dynamic_shapes=(dims,), strict=False)
            graph = exported.module(check_guards=False)
    except Exception as error:
        return why_untraced(error)
    if tensors[0][0].device.type == "meta":
        return ""
    reasons = (_differs(graph, call, group, module) for call, group in zip(calls, tensors, strict=True))
    return next((reason for reason in reasons if reason), "")


def _differs(graph: Any, call: Call, tensors: list[Tensor], module: nn.Module) -> str:
    try:
        expected = Alone(module, call)(*[tensor.clone() for tensor in tensors])
    except (RuntimeError, IndexError, ValueError):
        return ""  # it does not run alone, so nothing is known of its graph
    try:
        actual = graph.forward(*tensors)  # without the hooks that hold it to the traced ranges
    except (RuntimeError, IndexError, ValueError, AssertionError) as error:
        return f"its graph does not run at another shape: {first_line(error)}"
    for one, other in zip(actual, expected, strict=True):
        if one.shape != other.shape:
            return f"its graph gives {list(one.shape)}, not {list(other.shape)}"
        if not relative_difference(one.double(), other.double()) <= TOLERANCE:
            return "its graph gives other values at another shape"
    return ""
