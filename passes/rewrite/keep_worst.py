"""After fitting: leave the sites that fit worst as softmax, with their key-value cache.

A few layers do most of the recall, and their error says which: on the embedded model one of four layers carries nearly
all of what a fixed-size state loses. Published hybrids choose such layers by hand (Lizard, Jamba, Mamba-2-Hybrid).
"""

from __future__ import annotations

import math

from linearize.passes.rewrite.carry_history import CarryHistory
from linearize.passes.rewrite.insert_mixers import InsertMixers
from linearize.pipeline import run_pipeline
from linearize.plan import Plan
from linearize.program import MIXERS, Program
from linearize.report import Report
from linearize.rewriting.walk import attribute


def keep_worst(teacher: Program, student: Program, plan: Plan, report: Report, share: float) -> tuple[Plan, Program]:
    """Keep `share` of the sites (rounded up), those with the largest fitted error; the other mixers stay as fitted.

    Without measured errors (nothing was fitted) the plan stays as it is, and the report says so.
    """
    errors = {row.site: row.error_fitted for row in report.sites if row.error_fitted is not None}
    if not errors:
        report.notes.append("keep_worst: nothing was fitted, so no site's error is known and none was kept")
        return plan, student
    worst = sorted(errors, key=lambda site: -errors[site])[: math.ceil(share * len(plan.entries))]
    reason = "kept: among the largest errors after fitting"
    entries = [
        entry.model_copy(update={"mixer": "keep", "options": {}, "reason": reason}) if entry.site in worst else entry
        for entry in plan.entries
    ]
    plan = plan.model_copy(update={"entries": tuple(entries)})
    kept = run_pipeline(teacher, [InsertMixers(plan), CarryHistory()])
    for site in student.matched:
        if site.index not in worst:
            fitted = attribute(student.module, f"{MIXERS}.{site.index}")
            attribute(kept.module, f"{MIXERS}.{site.index}").load_state_dict(fitted.state_dict())
    for row in report.sites:
        if row.site in worst:
            row.reason = f"{reason} ({row.error_fitted:.3f} as {row.mixer})"
            row.mixer, row.error_fitted, row.parameters = "keep", 0.0, 0
    return plan, kept.replace(history=student.history)
