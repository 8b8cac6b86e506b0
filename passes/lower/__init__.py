"""From mixers to operators to kernels."""

from __future__ import annotations

from linearize.passes.lower.inline_mixers import InlineMixers

LOWER_PASSES = (InlineMixers(),)
