"""What each way of exporting takes: states, and models. The writers refuse by it, and so does the planner, which asks
before there is anything to write.

A way is a format with those of its options that change what it takes; quantising does not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from linearize.errors import ExportError
from linearize.program import Program, StateTensor


@dataclass(frozen=True)
class Way:
    """`format` and `options` are what `linearize.export` is called with. `fixed` says why a state may not grow with the
    context, '' where it may; `needs_state`: some layer must have one."""

    name: str
    format: str
    options: tuple[str, ...] = ()
    fixed: str = ""
    needs_state: bool = False

    def arguments(self) -> dict[str, Any]:
        """Of `linearize.export`, beside the model and the directory."""
        return {"format": self.format, **dict.fromkeys(self.options, True)}

    def growing(self, specs: Sequence[StateTensor]) -> str | None:
        """Why these states, of one mixer or of a model, cannot be carried; None where they can."""
        found = [spec.name for spec in specs if spec.grows is not None]
        if not self.fixed or not found:
            return None
        return self.fixed.format(name=found[0], count=len(found))


ONNX = Way("onnx", "onnx")
PORTABLE = Way("portable", "onnx", ("portable",))
GENAI = Way(
    "genai",
    "onnx",
    ("genai",),
    "onnxruntime-genai cannot carry {name} ({count} states that grow with the context): "
    "its recurrent states have fixed shapes",
    needs_state=True,
)
TORCHSCRIPT = Way(
    "torchscript", "torchscript", fixed="a trace has fixed shapes, and {name} grows with the context"
)
PT2 = Way("pt2", "pt2")
WAYS = {way.name: way for way in (ONNX, PORTABLE, GENAI, TORCHSCRIPT, PT2)}


def way_of(name: str) -> Way:
    """Raises ExportError where there is none of that name; it lists them."""
    if name not in WAYS:
        raise ExportError(f"no way of exporting is named {name!r}; there are {', '.join(WAYS)}")
    return WAYS[name]


def program_refusal(program: Program) -> str | None:
    """Why no way takes a program with states, whatever its mixers are; None where they all do."""
    if program.stateless_reason:
        return f"this model cannot run step by step, so it has no state to export: {program.stateless_reason}"
    if program.leaves:
        return (
            f"{', '.join(program.leaves)} could not be traced and run the source's Python code, which no "
            "exported file can hold; rewrite these modules without control flow that depends on values or lengths"
        )
    for name, tensor in program.module.named_parameters():
        if tensor.dtype != torch.float32:
            return f"{name} is {tensor.dtype}; compile the model in float32 to export it"
    return None
