"""Plan: what every site becomes and why. Readable JSON, printable and editable before anything changes.

`linearize.plan_file` reads one from a file and says which line is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from linearize.errors import RecipeError
from linearize.files import write_atomically


class PlanEntry(BaseModel):
    """One site: `mixer` with its `options`, and the `reason` that the planner had."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: int = Field(ge=0)
    module: str
    mixer: str
    options: dict[str, Any] = Field(default_factory=dict)
    reason: str = ""

    def label(self) -> str:
        """`lolcats{window=64}`"""
        options = ",".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.mixer}{{{options}}}" if options else self.mixer


class LowRankEntry(BaseModel):
    """A weight that becomes a product of two, by its name in the source, and the rank that is left."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    weight: str
    rank: int = Field(ge=1)


class Fit(BaseModel):
    """Fitting by output MSE: tokens to fit on, sequence length, batch, Adam's rate and passes over the data (0: only
    what is found without gradients)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(default=65_536, ge=0)
    length: int = Field(default=512, ge=8)
    batch: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-2, gt=0)
    passes: int = Field(default=1, ge=0)


class PlanFigures(BaseModel):
    """What the planner said of a plan when it wrote it. Loss is KL(source || plan) in nats a token; bytes are of one
    state at `context` and `batch`; seconds are of one decoded token on `target`; `exports` names the ways of exporting
    that were to take it. `estimate`: how losses were predicted where they were not measured site by site."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    context: int = Field(ge=1)
    batch: int = Field(default=1, ge=1)
    budget: str = ""
    target: str = ""
    state_bytes: int = Field(ge=0)
    source_bytes: int = Field(ge=0)
    predicted_loss: float
    measured_loss: float | None = None
    predicted_seconds: float | None = None
    source_seconds: float | None = None
    weight_bytes: int | None = None
    source_weight_bytes: int | None = None
    exports: tuple[str, ...] | None = None
    estimate: Literal["second order"] | None = None


class Plan(BaseModel):
    """A mixer for every matched site of one model. `fit`: how mixers that learn are fitted; None leaves it to the
    recipe that the plan is compiled with. `low_rank`: weights that become products of two thin ones. Version 2 added
    `fit` and `figures`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1, 2] = 2
    recipe: str = ""
    figures: PlanFigures | None = None
    fit: Fit | None = None
    entries: tuple[PlanEntry, ...] = ()
    low_rank: tuple[LowRankEntry, ...] = ()

    def entry(self, site: int) -> PlanEntry:
        """The entry of a site.

        Raises:
            RecipeError: the plan says nothing of it.
        """
        for entry in self.entries:
            if entry.site == site:
                return entry
        raise RecipeError(f"the plan has no entry for site {site}; it has {[entry.site for entry in self.entries]}")

    def check(self, sites: Sequence[int]) -> None:
        """Exactly the matched sites are planned, each once.

        Raises:
            RecipeError: naming the sites that are missing, doubled or unknown.
        """
        planned = [entry.site for entry in self.entries]
        doubled = {site for site in planned if planned.count(site) > 1}
        missing, unknown = set(sites) - set(planned), set(planned) - set(sites)
        for problem, found in (("twice", doubled), ("not", missing)):
            if found:
                raise RecipeError(f"the plan names the sites {sorted(found)} {problem}; the model has {sorted(sites)}")
        if unknown:
            raise RecipeError(f"the plan names the sites {sorted(unknown)}, which the model does not have matched")

    def save(self, path: str | Path) -> Path:
        return write_atomically(Path(path), (self.model_dump_json(indent=1, exclude_none=True) + "\n").encode())

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan.

        Raises:
            RecipeError: the file is not there, is no JSON, or has a wrong or unknown field, mixer or option; the line
                is named.
        """
        from linearize.plan_file import read_plan

        return read_plan(path).plan

    def __str__(self) -> str:
        rows = [f"{entry.site:4d}  {entry.module:40s}  {entry.label():32s}  {entry.reason}" for entry in self.entries]
        rows += [f"      {entry.weight:40s}  rank {entry.rank}" for entry in self.low_rank]
        return "\n".join([f"plan of recipe {self.recipe or '(none)'}", *rows])


def first_problem(error: ValidationError) -> str:
    """`entries.2.mixer: Field required` from a pydantic error."""
    problem = error.errors()[0]
    return f"{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}"
