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

    The operators of a small model are shorter than the wait for a second thread. Measured on the embedded model, two
    cores of which another process used one: sampling and fitting took 82 s on one thread and 469 s on two.
    """
    parameters = sum(parameter.numel() for parameter in program.module.parameters())
    if program.device.type != "cpu" or parameters >= SMALL:
        yield
        return
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
