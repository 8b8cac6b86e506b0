"""How an operator enters `torch.library`: schema, fake, reference and backward in one call.

Every operator is opaque to torch.export and torch.compile (one node, dynamic sizes) and has three eager forms:

- `recurrence`: the plain token loop, the truth of the tests, in float64 if its inputs are;
- `reference`: loop-free standard operators only; the `CompositeExplicitAutograd` kernel, and what export decomposes to;
- `streamed`: the reference applied piece by piece with the state carried, so that memory stays linear in the
  length. The backward recomputes it and differentiates.

Faster forms for a device live in `linearize.kernels`, which installs them over the reference.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from linearize.errors import LinearizeError
from linearize.ops._backward import by_recomputing

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
        setup_context, backward = by_recomputing(name, streamed)
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

