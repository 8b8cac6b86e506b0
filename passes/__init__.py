"""Every pass, in the order in which they run."""

from __future__ import annotations

from linearize.passes.match import MATCH_PASSES
from linearize.passes.normalise import NORMALISE_PASSES
from linearize.pipeline import Pass

CAPTURE_PASSES: tuple[Pass, ...] = (*NORMALISE_PASSES, *MATCH_PASSES)
