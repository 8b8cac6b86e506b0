"""Gradients of the operators: by a kernel where one claims the call, else by differentiating the streamed form again.

A kernel's launches cannot be traced, so under torch.compile a claimed backward stays one opaque node,
`linearize::<operator>_backward`, with the operator's keywords; it runs the kernel when the compiled graph runs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import detect_fake_mode

Form = Callable[..., Any]
Gradients = Sequence[Tensor | None]


@dataclass(frozen=True)
class Backward:
    """Gradients by a kernel. Both functions take (inputs, gradients of the outputs, which inputs need one, keywords):
    `claims` says whether the kernel takes the call, `run` returns as many gradients as there are inputs."""

    claims: Callable[..., bool]
    run: Form


# (operator, device type) -> its kernel. `linearize.kernels` fills it.
BACKWARDS: dict[tuple[str, str], Backward] = {}


def by_recomputing(name: str, streamed: Form) -> tuple[Form, Form]:
    """(setup_context, backward) of an operator that save its inputs only."""

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
        call = inputs, grad_outputs, needed, ctx.keywords
        kernel = BACKWARDS.get((name, inputs[0].device.type))
        if kernel is None or not kernel.claims(*call):
            return tuple(differentiated(streamed, *call))[:passed]
        run = _as_one_node(name) if detect_fake_mode([x for x in inputs if x is not None]) else kernel.run
        return tuple(run(*call))[:passed]

    return setup_context, backward


def differentiated(
    form: Form, inputs: Sequence[Any], grad_outputs: Gradients, needed: Sequence[bool], keywords: dict[str, Any]
) -> Gradients:
    """Gradient of the form's outputs that have one with respect to the needed inputs; None for the others."""
    with torch.enable_grad():
        leaves = [
            x.detach().requires_grad_(need) if isinstance(x, Tensor) else x
            for x, need in zip(inputs, needed, strict=True)
        ]
        outputs = form(*leaves, **keywords)
        outputs = (outputs,) if isinstance(outputs, Tensor) else outputs
    pairs = [(o, g) for o, g in zip(outputs, grad_outputs, strict=True) if g is not None and o.requires_grad]
    wanted = [x for x, need in zip(leaves, needed, strict=True) if need]
    if not pairs or not wanted:
        return (None,) * len(inputs)
    found = iter(torch.autograd.grad([o for o, _ in pairs], wanted, [g for _, g in pairs], allow_unused=True))
    return tuple(next(found) if need else None for need in needed)


def define_backward(library: torch.library.Library, name: str, schema: str, streamed: Form) -> None:
    """Define `<name>_backward`, the node that a traced backward becomes; `schema` is the operator's own."""
    keywords = schema.partition("*, ")[2].partition(")")[0]
    qualified = f"{name}_backward(Tensor?[] inputs, Tensor?[] gradients, bool[] needed, *, {keywords}) -> Tensor[]"

    def run(
        inputs: Sequence[Tensor | None], gradients: Gradients, needed: Sequence[bool], **keywords: Any
    ) -> list[Tensor]:
        call = inputs, gradients, needed, keywords
        kernel = BACKWARDS.get((name, str(_first(inputs).device.type)))
        claimed = kernel is not None and kernel.claims(*call)
        found = kernel.run(*call) if kernel is not None and claimed else differentiated(streamed, *call)
        pairs = [(x, dx) for x, dx, need in zip(inputs, found, needed, strict=True) if x is not None and need]
        return [torch.zeros_like(x) if dx is None else dx.contiguous() for x, dx in pairs]

    def fake(
        inputs: Sequence[Tensor | None], gradients: Gradients, needed: Sequence[bool], **keywords: Any
    ) -> list[Tensor]:
        return [x.new_empty(x.shape) for x, need in zip(inputs, needed, strict=True) if x is not None and need]

    library.define(qualified)
    library.impl(f"{name}_backward", run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{library.ns}::{name}_backward", fake, lib=library)


def _as_one_node(name: str) -> Form:
    def call(
        inputs: Sequence[Any], gradients: Gradients, needed: Sequence[bool], keywords: dict[str, Any]
    ) -> list[Tensor | None]:
        node = getattr(torch.ops.linearize, f"{name}_backward").default
        found = iter(node(list(inputs), list(gradients), list(needed), **keywords))
        return [next(found) if need else None for need in needed]

    return call


def _first(inputs: Sequence[Tensor | None]) -> Tensor:
    return next(x for x in inputs if x is not None)
