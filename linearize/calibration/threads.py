"""How many threads fitting uses on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from linearize.program import Program

SMALL = 20_000_000


@contextmanager
def threads_for(program: Program) -> Iterator[None]:
    """One thread for a model of fewer than 20M parameters on a CPU, torch's own number otherwise.

    The operators of a small model are shorter than the wait for a second thread, above all where another process
    wants the core. Two runs of `linearize demo` on two busy cores: its step "compile and fit" took 77 s on one thread
    and 469 s on two. How the two compare on idle cores was not measured.
    """
    parameters = sum(parameter.numel() for parameter in program.module.parameters())
    if program.place.type != "cpu" or parameters >= SMALL:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
