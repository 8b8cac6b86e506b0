"""CPU kernels. Importing this package registers them."""

from linearize.kernels.cpu.attention import BLOCKS, SDPA
from linearize.kernels.cpu.delta import DELTA_STEP, DELTA_STREAM
from linearize.kernels.cpu.evict import EVICT_STEP, EVICT_STREAM
from linearize.kernels.cpu.gla import GLA_STEP, GLA_STREAM
from linearize.kernels.cpu.gla_vec import GLA_VEC_STEP, GLA_VEC_STREAM
from linearize.kernels.cpu.hybrid import HYBRID_STEP, HYBRID_STREAM
from linearize.kernels.cpu.hybrid_ring import HYBRID_RING_C
from linearize.kernels.cpu.mla import MLA_DECODE
from linearize.kernels.cpu.slots import SLOTS_STEP, SLOTS_STREAM
from linearize.kernels.cpu.slots_block import SLOTS_BLOCK, SLOTS_MERGE
from linearize.kernels.cpu.slots_step import SLOTS_STEP_C
from linearize.kernels.cpu.steps import DELTA_STEP_C, GLA_STEP_C, GLA_VEC_STEP_C, HYBRID_STEP_C

__all__ = [
    "BLOCKS",
    "DELTA_STEP",
    "DELTA_STEP_C",
    "DELTA_STREAM",
    "EVICT_STEP",
    "EVICT_STREAM",
    "GLA_STEP",
    "GLA_STEP_C",
    "GLA_STREAM",
    "GLA_VEC_STEP",
    "GLA_VEC_STEP_C",
    "GLA_VEC_STREAM",
    "HYBRID_RING_C",
    "HYBRID_STEP",
    "HYBRID_STEP_C",
    "HYBRID_STREAM",
    "MLA_DECODE",
    "SDPA",
    "SLOTS_BLOCK",
    "SLOTS_MERGE",
    "SLOTS_STEP",
    "SLOTS_STEP_C",
    "SLOTS_STREAM",
]
