"""How an operator enters `torch.library`: schema, fake, reference and backward in one call.

Every operator is opaque to torch.export and torch.compile (one node, dynamic sizes) and has three eager forms:

- `recurrence`: the plain token loop, the truth of the tests, in float64 if its inputs are;
- `reference`: loop-free standard operators only; the `CompositeExplicitAutograd` kernel, and what export decomposes to;
- `streamed`: the reference applied piece by piece with the state carried, so that memory stays linear in the
  length. The backward recomputes it and differentiates.

Faster forms for a device live in `linearize.kernels`, which installs them over the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from linearize.errors import LinearizeError

NAMESPACE = "linearize"
LIBRARY = torch.library.Library(NAMESPACE, "FRAGMENT")

Form = Callable[..., Any]


class OperatorError(LinearizeError, ValueError):
    """The tensors handed to an operator do not fit its contract."""


@dataclass(frozen=True)
class Operator:
    """An operator of the namespace `linearize` and its eager forms; all take the schema's arguments."""

    name: str
    overload: torch._ops.OpOverload
    reference: Form
    recurrence: Form
    streamed: Form
    composed: Form


OPERATORS: dict[str, Operator] = {}
# (operator, device type): gradients by a kernel, (inputs, gradients of the outputs, which inputs need one, keywords) ->
# as many gradients as inputs, or None where it declines. `linearize.kernels` fills it.
BACKWARDS: dict[tuple[str, str], Form] = {}


def define_operator(
    schema: str, *, fake: Form, reference: Form, recurrence: Form, streamed: Form, composed: Form | None = None
) -> Operator:
    """Define `linearize::<schema>`: shapes by `fake`, values by `reference`, gradients by recomputing `streamed`.

    An operator that is made of others of ours gives `composed`, the form that calls them: it runs where no kernel
    claims, so that their kernels serve it. Operators that write to an argument have no gradient: torch allows none.
    """
    name = schema.partition("(")[0]
    qualified = f"{NAMESPACE}::{name}"
    LIBRARY.define(schema)
    LIBRARY.impl(name, composed or reference, "CompositeExplicitAutograd")
    torch.library.register_fake(qualified, fake, lib=LIBRARY)
    if "!" not in schema:
        setup_context, backward = _recompute(name, streamed)
        torch.library.register_autograd(qualified, backward, setup_context=setup_context, lib=LIBRARY)
    overload = getattr(torch.ops.linearize, name).default
    operator = Operator(name, overload, reference, recurrence, streamed, composed or reference)
    OPERATORS[name] = operator
    return operator


def decompositions() -> dict[torch._ops.OpOverload, Form]:
    """Table for `ExportedProgram.run_decompositions` that replaces every operator by standard ones (for ONNX)."""
    return {operator.overload: operator.reference for operator in OPERATORS.values()}


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Dtype of scores, denominators and states: float64 for float64 inputs, float32 for everything else."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def require(condition: bool, operator: str, message: str) -> None:
    """Raise `OperatorError` naming the operator unless `condition` holds."""
    if not condition:
        raise OperatorError(f"{NAMESPACE}::{operator}: {message}")


def _recompute(name: str, function: Form) -> tuple[Form, Form]:
    """(setup_context, backward) that save the inputs only and differentiate `function` on them again, where no kernel
    does it faster."""

    def setup_context(
        ctx: Any, inputs: Sequence[Any], output: Any, keyword_only_inputs: dict[str, Any] | None = None
    ) -> None:
        ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
        ctx.others = [None if isinstance(value, Tensor) else value for value in inputs]
        ctx.keywords = keyword_only_inputs or {}
        ctx.save_for_backward(*(value for value in inputs if isinstance(value, Tensor)))

    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = iter(ctx.saved_tensors)
        inputs = [next(saved) if tensor else other for tensor, other in zip(ctx.is_tensor, ctx.others, strict=True)]
        passed = len(ctx.needs_input_grad)  # the dispatcher drops trailing arguments that equal their defaults
        needed = [*ctx.needs_input_grad, *(False for _ in inputs[passed:])]
        kernel = BACKWARDS.get((name, inputs[0].device.type))
        found = None if kernel is None else kernel(inputs, grad_outputs, needed, ctx.keywords)
        if found is not None:
            return tuple(found)[:passed]
        with torch.enable_grad():
            inputs = [_leaf(x, need) if isinstance(x, Tensor) else x for x, need in zip(inputs, needed, strict=True)]
            outputs = function(*inputs, **ctx.keywords)
            outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
        return _gradients(outputs, grad_outputs, inputs, needed)[:passed]

    return setup_context, backward


def _leaf(tensor: Tensor, needs_grad: bool) -> Tensor:
    return tensor.detach().requires_grad_(needs_grad)


def _gradients(
    outputs: Sequence[Tensor], grad_outputs: Sequence[Tensor | None], inputs: Sequence[Any], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradient of the outputs that have one with respect to the needed inputs; None for the others."""
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
    wanted = [tensor for tensor, need in zip(inputs, needed, strict=True) if need]
    if not pairs or not wanted:
        return (None,) * len(inputs)
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    return tuple(next(found) if need else None for need in needed)
