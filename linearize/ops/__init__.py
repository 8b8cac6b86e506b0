"""The operators of the namespace `linearize`, one file each. Call them, or find them by name in `OPERATORS`."""

from linearize.ops._library import OPERATORS, Operator, OperatorError, decompositions
from linearize.ops.attention import attention
from linearize.ops.delta import delta_chunk
from linearize.ops.evict import evict_chunk
from linearize.ops.gla import gla_chunk
from linearize.ops.gla_vec import gla_vec_chunk
from linearize.ops.grouped_mm import grouped_mm
from linearize.ops.hybrid import hybrid_chunk
from linearize.ops.hybrid_ring import hybrid_ring
from linearize.ops.hybrid_step import hybrid_step
from linearize.ops.mla_decode import mla_decode
from linearize.ops.short_conv import short_conv
from linearize.ops.slots import slots_chunk
from linearize.ops.slots_block import slots_block
from linearize.ops.slots_merge import slots_merge
from linearize.ops.steps import delta_step, gla_step, gla_vec_step

__all__ = [
    "OPERATORS",
    "Operator",
    "OperatorError",
    "attention",
    "decompositions",
    "delta_chunk",
    "delta_step",
    "evict_chunk",
    "gla_chunk",
    "gla_step",
    "gla_vec_chunk",
    "gla_vec_step",
    "grouped_mm",
    "hybrid_chunk",
    "hybrid_ring",
    "hybrid_step",
    "mla_decode",
    "short_conv",
    "slots_block",
    "slots_chunk",
    "slots_merge",
]
