"""Recipes: named policies as data. Which mixer each layer gets, its options, and how it is fitted."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from linearize.distill import Distill
from linearize.errors import RecipeError
from linearize.mixers import mixer_class, mixer_names
from linearize.plan import Fit, Plan, PlanEntry, first_problem
from linearize.spec import Site

NONE = "none"
_CALL = re.compile(r"^(?P<name>[^{}]+?)(\{(?P<options>[^{}]*)\})?$")


class Score(NamedTuple):
    """A number per site that a rule ranks them by; `mixer` and `options` (sorted) are the candidate it is measured for.

    Kinds: "similarity" of a block's input before and after its attention, "error" of the candidate's output, "loss" of
    the model with the candidate at this one site. `linearize.calibration.scores` measures them.
    """

    kind: str
    mixer: str = ""
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """`similarity`, `error of lolcats{window=64}`"""
        options = ",".join(f"{key}={value}" for key, value in self.options)
        mixer = f"{self.mixer}{{{options}}}" if options else self.mixer
        return f"{self.kind} of {mixer}" if mixer else self.kind


# kind of rule: the score it ranks by, and whether the largest values are taken
RANKED = {
    "most_similar": ("similarity", True),
    "least_similar": ("similarity", False),
    "largest_error": ("error", True),
    "smallest_error": ("error", False),
    "most_sensitive": ("loss", True),
    "least_sensitive": ("loss", False),
}
Scores = Mapping[str, Mapping[int, float]]


class LayerRule(BaseModel):
    """Which sites get which mixer: all of them, every n-th from `first`, a list, or a `share` of them (rounded, at
    least one site) by a score. `of` names the mixer whose error or loss is meant, where it is not the rule's own (its
    options are then that mixer's defaults). Later rules win.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mixer: str
    layers: Literal[
        "all", "every", "list", "most_similar", "least_similar", "largest_error", "smallest_error",
        "most_sensitive", "least_sensitive",
    ] = "all"  # fmt: skip
    n: int = Field(default=1, ge=1)
    first: int = Field(default=0, ge=0)
    indices: tuple[int, ...] = ()
    share: float = Field(default=0.5, gt=0, le=1)
    of: str = ""
    options: dict[str, Any] = Field(default_factory=dict)

    @property
    def score(self) -> Score | None:
        """What has to be measured before the rule can choose; None where nothing has."""
        if self.layers not in RANKED:
            return None
        kind = RANKED[self.layers][0]
        if kind == "similarity":
            return Score(kind)
        return Score(kind, self.of) if self.of else Score(kind, self.mixer, tuple(sorted(self.options.items())))

    def resolved(self, scores: Scores) -> LayerRule:
        """The same rule with the sites that it chooses listed.

        Raises:
            RecipeError: its score was not measured.
        """
        if self.score is None:
            return self
        values = scores.get(self.score.name)
        if values is None:
            raise RecipeError(f"layers = {self.layers!r} needs the sites' {self.score.name}, which was not measured")
        sign = -1.0 if RANKED[self.layers][1] else 1.0
        ranked = sorted(values, key=lambda site: (sign * values[site], site))
        count = max(1, round(self.share * len(ranked)))
        return self.model_copy(update={"indices": tuple(sorted(ranked[:count]))})

    def reason(self, site: int, scores: Scores) -> str:
        if self.layers == "all":
            return "recipe"
        detail = f": {self.score.name} {scores[self.score.name][site]:.4g}" if self.score is not None else ""
        return f"rule {self.layers}{detail}"

    def applies(self, site: int) -> bool:
        if self.layers == "every":
            return site >= self.first and (site - self.first) % self.n == 0
        return self.layers == "all" or site in self.indices


class HeadWindows(BaseModel):
    """Windows of `moa` by kv head, `mean` keys on average at `context`, chosen by measured error
    (`calibration.head_windows`); `sinks` first tokens come on top."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mean: float = Field(default=192, gt=0)
    context: int = Field(default=4096, ge=1)
    sinks: int = Field(default=4, ge=0)


class KVSharing(BaseModel):
    """A `share` of the kept sites (rounded) reads another's cache, as long as the final hidden states' mean cosine
    with the source's stays above `threshold` (`calibration.kv_sharing`)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    share: float = Field(default=0.25, gt=0, le=1)
    threshold: float = Field(default=0.5, ge=-1, le=1)


class LowRank(BaseModel):
    """Weights become products of two, with at most the share `keep` of their numbers (`calibration.low_rank`): `all`
    but the output projection, those of the `attention`, or of its keys and values alone."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: float = Field(default=0.8, gt=0, lt=1)
    of: Literal["all", "attention", "key_value"] = "all"


class Recipe(BaseModel):
    """A named policy; `Recipe.load(name)` reads a built-in one or a TOML file.

    `keep_worst`: this share of the sites, those with the largest error after fitting, stays softmax with its cache.
    `distill`: training of the whole model afterwards; none by default.
    The tables `head_windows`, `kv_sharing` and `low_rank` are searches on data that complete what the rules say.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    source: str = ""
    rules: tuple[LayerRule, ...]
    fit: Fit = Fit()
    distill: Distill = Distill()
    keep_worst: float = Field(default=0.0, ge=0, le=1)
    head_windows: HeadWindows | None = None
    kv_sharing: KVSharing | None = None
    low_rank: LowRank | None = None

    @property
    def searches(self) -> dict[str, BaseModel]:
        """The tables that are there, by name."""
        found = {"head_windows": self.head_windows, "kv_sharing": self.kv_sharing, "low_rank": self.low_rank}
        return {name: table for name, table in found.items() if table is not None}

    @staticmethod
    def load(name: str | Path) -> Recipe:
        """A recipe by name, by name with options (`lolcats{window=32}`), or from a `.toml` file. The name of a mixer
        that no recipe has is a recipe too: that mixer in every layer.

        Raises:
            RecipeError: there is none of that name, or the file is not valid (the field is named).
        """
        match = _CALL.match(str(name).strip())
        if match is None:
            raise RecipeError(f"cannot read the recipe {str(name)!r}; write name or name{{option=value,...}}")
        recipe = _read(match["name"].strip())
        return recipe.with_options(**_options(match["options"])) if match["options"] else recipe

    def with_options(self, **options: Any) -> Recipe:
        """The same recipe with options of its mixers and searches replaced; every option must belong to at least one.

        Raises:
            RecipeError: no mixer of the recipe takes an option of that name, or a search does not take its value.
        """
        taken = {rule.mixer: _parameters(rule.mixer) for rule in self.rules}
        tables = {name: set(type(table).model_fields) for name, table in self.searches.items()}
        taken |= tables
        for key in options:
            if not any(key in names for names in taken.values()):
                known = sorted(set().union(*taken.values()))
                raise RecipeError(f"recipe {self.name} has no option {key!r}; its mixers take {known or 'none'}")
        rules = tuple(
            rule.model_copy(update={"options": {**rule.options, **_only(options, taken[rule.mixer])}})
            for rule in self.rules
        )
        try:
            changed = {
                name: type(table).model_validate({**table.model_dump(), **_only(options, tables[name])})
                for name, table in self.searches.items()
            }
        except ValidationError as error:
            raise RecipeError(f"recipe {self.name}: {first_problem(error)}") from error
        return self.model_copy(update={"rules": rules, **changed})

    def wanted_scores(self) -> list[Score]:
        """What has to be measured on the model before `plan`, each once."""
        return list({rule.score.name: rule.score for rule in self.rules if rule.score is not None}.values())

    def plan(self, sites: Sequence[Site], scores: Scores | None = None) -> Plan:
        """What each matched site becomes, and why; `scores` holds `wanted_scores` by name and site.

        Raises:
            RecipeError: a rule ranks the sites by a score that is not there.
        """
        scores = scores or {}
        rules = [rule.resolved(scores) for rule in self.rules]
        return Plan(recipe=self.name, entries=tuple(self._entry(site, rules, scores) for site in sites))

    def _entry(self, site: Site, rules: list[LayerRule], scores: Scores) -> PlanEntry:
        rule = next((rule for rule in reversed(rules) if rule.applies(site.index)), None)
        if rule is None:
            return PlanEntry(site=site.index, module=site.module, mixer="keep", reason="no rule of the recipe applies")
        sliding = site.attention.mask.size if site.attention.mask.kind == "sliding" else 0
        if sliding and rule.mixer != "drop":
            return _sliding_entry(site, sliding)
        refusal = _refusal(rule, site)
        if refusal is not None:
            return PlanEntry(site=site.index, module=site.module, mixer="keep", reason=refusal)
        reason = rule.reason(site.index, scores)
        return PlanEntry(
            site=site.index, module=site.module, mixer=rule.mixer, options=dict(rule.options), reason=reason
        )


def _refusal(rule: LayerRule, site: Site) -> str | None:
    try:
        return mixer_class(rule.mixer).refusal_with(site, rule.options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"site {site.index} ({site.module}): {rule.mixer}: {error}") from error


def _sliding_entry(site: Site, size: int) -> PlanEntry:
    """A source's own sliding window is constant memory as it stands: a ring of exactly its keys equals it."""
    extra = {"a soft-cap": site.attention.softcap, "sink logits": site.attention.sinks, "ALiBi": site.attention.alibi}
    beside = [name for name, has in extra.items() if has]
    if beside:
        reason = f"sliding window with {' and '.join(beside)}"
        return PlanEntry(site=site.index, module=site.module, mixer="keep", reason=reason)
    return PlanEntry(
        site=site.index, module=site.module, mixer="window", options={"window": size},
        reason=f"slides over {size} keys in the source already: exact",
    )  # fmt: skip


def recipes() -> list[str]:
    """Names of the built-in recipes, sorted; "none" rewrites everything back and equals the source."""
    return sorted(path.name.removesuffix(".toml") for path in _folder().iterdir() if path.name.endswith(".toml"))


def _folder() -> Any:
    return resources.files("linearize") / "recipes"


def _read(name: str) -> Recipe:
    if name.endswith(".toml"):
        path: Any = Path(name)
    elif name in recipes():
        path = _folder() / f"{name}.toml"
    elif name in mixer_names():
        return Recipe(name=name, description=f"The mixer {name} in every layer.", rules=(LayerRule(mixer=name),))
    else:
        raise RecipeError(f"no recipe named {name!r}; there are {', '.join(recipes())}, or give a path to a .toml file")
    try:
        recipe = Recipe.model_validate(tomllib.loads(path.read_text()))
    except OSError as error:
        raise RecipeError(f"cannot read the recipe {name}: {error.strerror or error}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{name} is not TOML: {error}") from error
    except ValidationError as error:
        raise RecipeError(f"recipe {name}: {first_problem(error)}") from error
    for index, rule in enumerate(recipe.rules):
        if rule.of:
            mixer_class(rule.of)
        unknown = sorted(set(rule.options) - _parameters(rule.mixer))
        if unknown:
            raise RecipeError(
                f"recipe {name}: rules.{index}.options: {rule.mixer} has no option {unknown[0]!r}; "
                f"it takes {sorted(_parameters(rule.mixer)) or 'none'}"
            )
    return recipe


def _options(text: str) -> dict[str, Any]:
    """`window=32,sinks=4` -> {"window": 32, "sinks": 4}; values are read as TOML values."""
    options = {}
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = item.partition("=")
        try:
            options[key.strip()] = tomllib.loads(f"x = {value.strip()}")["x"]
        except tomllib.TOMLDecodeError as error:
            raise RecipeError(f"cannot read the option {item!r}; write option=value") from error
        if not equals:
            raise RecipeError(f"cannot read the option {item!r}; write option=value")
    return options


def _parameters(mixer: str) -> set[str]:
    return set(inspect.signature(mixer_class(mixer).__init__).parameters) - {"self", "spec"}


def _only(options: dict[str, Any], names: set[str]) -> dict[str, Any]:
    return {key: value for key, value in options.items() if key in names}
