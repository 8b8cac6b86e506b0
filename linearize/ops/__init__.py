"""The operators of the namespace `linearize`, one file each. Call them, or find them by name in `OPERATORS`."""

from linearize.ops._library import OPERATORS, Operator, OperatorError, decompositions
from linearize.ops.attention import attention
from linearize.ops.delta import delta_chunk
from linearize.ops.gla import gla_chunk
from linearize.ops.gla_vec import gla_vec_chunk
from linearize.ops.hybrid import hybrid_chunk
from linearize.ops.slots import slots_chunk

__all__ = [
    "OPERATORS",
    "Operator",
    "OperatorError",
    "attention",
    "decompositions",
    "delta_chunk",
    "gla_chunk",
    "gla_vec_chunk",
    "hybrid_chunk",
    "slots_chunk",
]
