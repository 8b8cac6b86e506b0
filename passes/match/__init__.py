"""Find every softmax attention, read what surrounds it, and prove it; nothing here edits a graph."""

from __future__ import annotations

from linearize.passes.match.match_attention import MatchAttention
from linearize.pipeline import Pass

MATCH_PASSES: tuple[Pass, ...] = (MatchAttention(),)
