"""Exact clean-up of a captured graph, so that later passes meet one spelling of each thing."""

from __future__ import annotations

from linearize.passes.normalise.expose_heads import ExposeHeads
from linearize.passes.normalise.lift_products import LiftProducts
from linearize.passes.normalise.reshape_views import ReshapeViews
from linearize.passes.normalise.spell_casts import SpellCasts
from linearize.passes.normalise.spell_einsums import SpellEinsums
from linearize.passes.normalise.spell_grouped_mm import SpellGroupedMM
from linearize.passes.normalise.spell_sinks import SpellSinks
from linearize.passes.normalise.spell_softmax import SpellSoftmax
from linearize.passes.normalise.strip_asserts import StripAsserts
from linearize.passes.normalise.strip_noops import StripNoops
from linearize.passes.normalise.unify_sizes import UnifySizes
from linearize.pipeline import Pass

NORMALISE_PASSES: tuple[Pass, ...] = (
    StripAsserts(), SpellCasts(), ReshapeViews(), StripNoops(), UnifySizes(),
    SpellEinsums(), SpellGroupedMM(), SpellSoftmax(), SpellSinks(), LiftProducts(), ExposeHeads(),
)  # fmt: skip
