"""Fast code for the operators of `linearize.ops`, by device. Importing this package puts it in use."""

from linearize.kernels import cpu, fla, triton
from linearize.kernels.registry import Choice, Kernel, choose, explain, install, kernels_for, recording, register

__all__ = [
    "Choice",
    "Kernel",
    "choose",
    "cpu",
    "explain",
    "fla",
    "install",
    "kernels_for",
    "recording",
    "register",
    "triton",
]

install()
