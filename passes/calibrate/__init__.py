"""Fitting as passes: output MSE by site, then the model as a whole; what is reached is recorded."""

from __future__ import annotations

from linearize.passes.calibrate.add_adapters import AddAdapters
from linearize.passes.calibrate.distill_end_to_end import DistillEndToEnd
from linearize.passes.calibrate.fit_outputs import CalibrateOutputs
from linearize.passes.calibrate.merge_adapters import MergeAdapters
from linearize.passes.calibrate.own_weights import OwnWeights

__all__ = ["AddAdapters", "CalibrateOutputs", "DistillEndToEnd", "MergeAdapters", "OwnWeights"]
