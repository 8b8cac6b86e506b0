"""Fitting as a pass: output MSE falls, and is recorded."""

from __future__ import annotations

from linearize.passes.calibrate.fit_outputs import CalibrateOutputs

__all__ = ["CalibrateOutputs"]
