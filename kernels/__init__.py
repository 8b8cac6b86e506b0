"""Fast code for the operators of `linearize.ops`, by device. Importing this package puts it in use."""

from linearize.kernels import cpu, triton
from linearize.kernels.registry import Kernel, choose, explain, install, kernels_for, register

__all__ = ["Kernel", "choose", "cpu", "explain", "install", "kernels_for", "register", "triton"]

install()
