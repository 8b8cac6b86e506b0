"""The curve of loss over bytes: a plan for every budget, and named recipes beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from linearize.calibration.keys import tokens_key
from linearize.calibration.scores import site_scores
from linearize.errors import RecipeError
from linearize.plan import PlanEntry
from linearize.planner.candidates import scored_options
from linearize.planner.costs import state_bytes
from linearize.planner.measuring import measured
from linearize.planner.planning import Budget, Planner
from linearize.progress import Progress
from linearize.recipe import Recipe, Score, recipes
from linearize.svg import COLOURS, Point, scatter_plot

SHARES = (0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.65, 0.8, 1.0)
LEAST = 1e-6  # nats a token: what is drawn for a loss of nothing


@dataclass(frozen=True)
class Mark:
    """A model on the plot: its name, bytes of state, measured loss; of a plan also the predicted loss."""

    name: str
    bytes: int
    loss: float
    predicted: float | None = None


def curve(planner: Planner, shares: Sequence[float] = SHARES, measurements: int = 6) -> list[Mark]:
    """The best plan of every budget that some plan fits. A plan is also in the running for every larger budget."""
    marks: list[Mark] = []
    found = []
    for share in shares:
        budget = Budget(share * planner.source_bytes, text=f"{share:.0%}")
        try:
            found.append(planner.best(budget, measurements))
        except RecipeError:
            continue
        losses = planner.measure(found)
        best = min(range(len(found)), key=lambda at: (losses[at], planner.bytes_of(found[at])))
        marks.append(Mark(budget.text, planner.bytes_of(found[best]), losses[best], planner.predicted(found[best])))
    return marks


def recipe_marks(planner: Planner, names: Iterable[str] | None = None) -> list[Mark]:
    """Named recipes at their own bytes, their mixers prepared without gradients and no further fitted."""
    plans = {name: recipe_entries(planner, Recipe.load(name)) for name in (site_recipes() if names is None else names)}
    scored = [scored_entries(planner, entries) for entries in plans.values()]
    losses = measured(planner.teacher, planner.train, planner.held, scored)
    return [
        Mark(name, bytes_of_entries(planner, entries), loss)
        for (name, entries), loss in zip(plans.items(), losses, strict=True)
    ]


def site_recipes() -> list[str]:
    """The built-in recipes that decide site by site, without searches over the whole model."""
    return [name for name in recipes() if not Recipe.load(name).searches]


def recipe_entries(planner: Planner, recipe: Recipe) -> list[PlanEntry]:
    """What a recipe makes of the model; what it ranks by is measured on the rows that scores were measured on, and so
    is what it would keep after fitting."""
    sites = planner.teacher.matched
    wanted = recipe.wanted_scores()
    worst = Score("error", recipe.rules[0].mixer, tuple(sorted(recipe.rules[0].options.items())))
    asked = [*wanted, worst] if recipe.keep_worst else wanted
    found = _scores(planner, asked) if asked else {}
    entries = list(recipe.plan(sites, found).entries)
    if not recipe.keep_worst:
        return entries
    errors = found[worst.name]
    kept = sorted(errors, key=lambda site: -errors[site])[: math.ceil(recipe.keep_worst * len(entries))]
    whole = {"mixer": "keep", "options": {}}
    return [entry.model_copy(update=whole) if entry.site in kept else entry for entry in entries]


def _scores(planner: Planner, wanted: Sequence[Score]) -> dict[str, dict[int, float]]:
    rows = list(planner.train)
    return site_scores(planner.teacher, lambda: rows, tokens_key(rows), wanted, Progress(False))


def scored_entries(planner: Planner, entries: Sequence[PlanEntry]) -> list[PlanEntry]:
    """As they are measured on the planner's rows, where those are shorter than its context."""
    length = min(planner.train[0].shape[1], planner.context)
    return [
        entry.model_copy(
            update={"options": scored_options(entry.mixer, entry.options, planner.context, length)}
        )
        for entry in entries
    ]


def bytes_of_entries(planner: Planner, entries: Sequence[PlanEntry]) -> int:
    by_site = {site.index: site.attention for site in planner.teacher.matched}
    return planner.base.state_bytes + sum(
        state_bytes(by_site[entry.site], entry.mixer, entry.options, planner.context, planner.batch)
        for entry in entries
    )


def drawn(marks: Sequence[Mark], others: Sequence[Mark], source_bytes: int, title: str) -> str:
    """One SVG: the curve of plans, and the recipes as points with their names."""
    line = [Point(f"plan at {mark.name}", mark.bytes / source_bytes, max(mark.loss, LEAST)) for mark in marks]
    points = [Point(mark.name, mark.bytes / source_bytes, max(mark.loss, LEAST)) for mark in others]
    return scatter_plot(
        line, points, title, "state, as a share of the source's cache", "KL, nats a token", COLOURS[1], COLOURS[2]
    )
