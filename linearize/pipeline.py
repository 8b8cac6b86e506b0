"""Passes in order, verified between one and the next."""

from __future__ import annotations

import enum
import gc
import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from typing import ClassVar, Literal, Protocol, runtime_checkable

from linearize.program import Program
from linearize.verify import check_exact, check_structure

Verify = Literal["structure", "numerics"]


class Stage(enum.IntEnum):
    """Where a pass stands; a pipeline's stages never decrease."""

    NORMALISE = 1
    MATCH = 2
    PLAN = 3
    REWRITE = 4
    CALIBRATE = 5
    LOWER = 6


class Keeps(enum.Enum):
    """Whether a pass keeps the function that the program computes."""

    EXACT = "exact"
    LOSSY = "lossy"


@runtime_checkable
class Pass(Protocol):
    """A frozen dataclass whose fields are its options. Valid program in, valid program out, the input untouched."""

    name: ClassVar[str]
    stage: ClassVar[Stage]
    keeps: ClassVar[Keeps]

    def run(self, program: Program) -> Program: ...


def run_pipeline(program: Program, passes: Iterable[Pass], verify: Verify | None = None) -> Program:
    """Run `passes` in order; each result is recorded in the program's history and verified.

    Args:
        verify: "structure" lints the graph, forbids mutation, and re-runs shapes on fake tensors where the graph
            changed; "numerics" also compares logits before and after every EXACT pass at a probe. None takes the
            environment variable LINEARIZE_VERIFY (the tests set it to numerics), or else "structure".

    Raises:
        VerificationError: a pass left the program invalid, or an exact pass changed its logits.
    """
    verify = verify or ("numerics" if os.environ.get("LINEARIZE_VERIFY") == "numerics" else "structure")
    for step in passes:
        started = time.perf_counter()
        with nullcontext() if step.stage is Stage.CALIBRATE else _collecting_later():
            after = step.run(program)
            if after.module is not program.module:
                check_structure(after, step.name)
                if verify == "numerics" and step.keeps is Keeps.EXACT:
                    check_exact(program, after, step.name)
            program = after.recorded(step.name, started)
    return program


@contextmanager
def _collecting_later() -> Iterator[None]:
    """No garbage collection inside: it walks all graphs there are, which made passes grow faster than their nodes."""
    running = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if running:
            gc.enable()
