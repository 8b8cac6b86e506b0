"""CPU kernels. Importing this package registers them."""

from linearize.kernels.cpu.attention import BLOCKS, SDPA
from linearize.kernels.cpu.gla import GLA_STEP, GLA_STREAM
from linearize.kernels.cpu.hybrid import HYBRID_STEP, HYBRID_STREAM

__all__ = ["BLOCKS", "GLA_STEP", "GLA_STREAM", "HYBRID_STEP", "HYBRID_STREAM", "SDPA"]
