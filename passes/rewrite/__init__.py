"""Edits of the graph: raise attentions to the canonical operator, put mixers in their place, thread the state."""

from __future__ import annotations

from linearize.passes.rewrite.carry_history import CarryHistory, read_carried
from linearize.passes.rewrite.insert_mixers import InsertMixers
from linearize.passes.rewrite.keep_worst import keep_worst
from linearize.passes.rewrite.lower_rank import LowerRank
from linearize.passes.rewrite.raise_attention import RaiseAttention
from linearize.passes.rewrite.share_keys import ShareKeys

__all__ = [
    "CarryHistory",
    "InsertMixers",
    "LowerRank",
    "RaiseAttention",
    "ShareKeys",
    "keep_worst",
    "read_carried",
]
