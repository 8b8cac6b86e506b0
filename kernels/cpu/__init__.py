"""CPU kernels. Importing this package registers them."""

from linearize.kernels.cpu.attention import BLOCKS, SDPA
from linearize.kernels.cpu.delta import DELTA_STEP, DELTA_STREAM
from linearize.kernels.cpu.gla import GLA_STEP, GLA_STREAM
from linearize.kernels.cpu.gla_vec import GLA_VEC_STEP, GLA_VEC_STREAM
from linearize.kernels.cpu.hybrid import HYBRID_STEP, HYBRID_STREAM
from linearize.kernels.cpu.slots import SLOTS_STEP, SLOTS_STREAM

__all__ = [
    "BLOCKS",
    "DELTA_STEP",
    "DELTA_STREAM",
    "GLA_STEP",
    "GLA_STREAM",
    "GLA_VEC_STEP",
    "GLA_VEC_STREAM",
    "HYBRID_STEP",
    "HYBRID_STREAM",
    "SDPA",
    "SLOTS_STEP",
    "SLOTS_STREAM",
]
