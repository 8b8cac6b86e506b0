"""How fast a machine is, as little as is needed to compare plans: a roofline with a price for every operator.

    seconds of an operator = overhead + max(bytes / bandwidth, operations / rate)

or, for an operator that was timed on the machine, a line through what was measured: seconds by bytes, once with little
memory in use around it and once with much, since what a step does not find in the caches costs more. A token's time is
the sum over the operators of its step, one after the other.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left
from collections.abc import Sequence
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from linearize.errors import RecipeError
from linearize.plan import first_problem
from linearize.planner.counting import MODULE, VIEW, Call

Points = list[tuple[float, float, float]]
NEAR, FAR = 6 * 2**20, 96 * 2**20  # bytes of a step's tensors at which operators are timed


class Target(BaseModel):
    """One machine. `bandwidth` in bytes and `rate` in operations a second; overheads in seconds: of an operator, of a
    view, of a module of a source in Python, and of a node of a compiled graph on top of its operator's. `timed` holds,
    by operator, (bytes, seconds where a step moves `NEAR` bytes in all, seconds where it moves `FAR`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: int = 1
    name: str
    bandwidth: float = Field(gt=0)
    rate: float = Field(gt=0)
    overhead: float = Field(ge=0)
    view_overhead: float = Field(default=0.0, ge=0)
    module_overhead: float = Field(default=0.0, ge=0)
    node_overhead: float = Field(default=0.0, ge=0)
    timed: dict[str, Points] = Field(default_factory=dict)

    def seconds(self, calls: Sequence[Call], graph: bool = True, within: Sequence[Call] | None = None) -> float:
        """Of operators one after the other, as nodes of a compiled graph unless told otherwise; `within` is the whole
        step that they are part of."""
        moved = sum(call.bytes for call in (calls if within is None else within))
        far = (math.log(max(moved, 1)) - math.log(NEAR)) / (math.log(FAR) - math.log(NEAR))
        part = min(max(far, 0.0), 1.0)
        return sum(self._one(call, part) for call in calls) + (self.node_overhead * len(calls) if graph else 0.0)

    def _one(self, call: Call, far: float) -> float:
        if call.name == VIEW:
            return self.view_overhead
        if call.name == MODULE:
            return self.module_overhead
        if call.name in self.timed:
            return along(self.timed[call.name], call.bytes, far)
        return self.overhead + max(call.bytes / self.bandwidth, call.operations / self.rate)


def along(points: Points, at: float, far: float) -> float:
    """On the line through `points`, its last piece going on; the first point's value before it. `far`, from 0 to 1, is
    how much of the difference between the two times counts."""
    ends = [(x, near + far * (distant - near)) for x, near, distant in points]
    if len(ends) == 1 or at <= ends[0][0]:
        return ends[0][1]
    right = min(max(bisect_left([x for x, _ in ends], at), 1), len(ends) - 1)
    (x0, y0), (x1, y1) = ends[right - 1], ends[right]
    return y0 + (y1 - y0) * (at - x0) / max(x1 - x0, 1e-12)


# Data sheet: 4.8 TB/s, 990 dense bf16 Tflop/s; 80 and 50 % of them reached; 4 microseconds between kernels of a graph.
H200 = Target(name="h200", bandwidth=0.8 * 4.8e12, rate=0.5 * 990e12, overhead=4e-6)


def load_target(name: str) -> Target:
    """`cpu` (measured here, once), `h200`, or a JSON file of a Target.

    Raises:
        RecipeError: there is no such target, or the file is not valid.
    """
    if name == "h200":
        return H200
    if name == "cpu":
        from linearize.planner.cpu import cpu_target

        return cpu_target()
    if not name.endswith(".json"):
        raise RecipeError(f"no target {name!r}; there are cpu and h200, or give a .json file")
    try:
        return Target.model_validate(json.loads(Path(name).read_text(encoding="utf-8")))
    except OSError as error:
        raise RecipeError(f"cannot read the target {name}: {error.strerror or error}") from error
    except ValueError as error:
        told = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise RecipeError(f"{name}: {told}") from error
