"""Recipes: named policies as data. Which mixer each layer gets, its options, and how it is fitted."""

from __future__ import annotations

import inspect
import re
import tomllib
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from linearize.errors import RecipeError
from linearize.mixers import mixer_class, mixer_names
from linearize.plan import Plan, PlanEntry, first_problem
from linearize.spec import Site

NONE = "none"
_CALL = re.compile(r"^(?P<name>[^{}]+?)(\{(?P<options>[^{}]*)\})?$")


class LayerRule(BaseModel):
    """Which sites get which mixer: all of them, every n-th from `first`, or a list. Later rules win."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mixer: str
    layers: Literal["all", "every", "list"] = "all"
    n: int = Field(default=1, ge=1)
    first: int = Field(default=0, ge=0)
    indices: tuple[int, ...] = ()
    options: dict[str, Any] = Field(default_factory=dict)

    def applies(self, site: int) -> bool:
        if self.layers == "every":
            return site >= self.first and (site - self.first) % self.n == 0
        return self.layers == "all" or site in self.indices


class Fit(BaseModel):
    """Fitting by output MSE: tokens to fit on, sequence length, batch, Adam's rate and passes over the data (0: only
    what is found without gradients)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(default=65_536, ge=0)
    length: int = Field(default=512, ge=8)
    batch: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=1e-2, gt=0)
    passes: int = Field(default=1, ge=0)


class Recipe(BaseModel):
    """A named policy; `Recipe.load(name)` reads a built-in one or a TOML file.

    `keep_worst`: this share of the sites, those with the largest error after fitting, stays softmax with its cache.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    description: str = ""
    source: str = ""
    rules: tuple[LayerRule, ...]
    fit: Fit = Fit()
    keep_worst: float = Field(default=0.0, ge=0, le=1)

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
        """The same recipe with options of its mixers replaced; every option must belong to at least one of them.

        Raises:
            RecipeError: no mixer of the recipe takes an option of that name.
        """
        taken = {rule.mixer: _parameters(rule.mixer) for rule in self.rules}
        for key in options:
            if not any(key in names for names in taken.values()):
                known = sorted(set().union(*taken.values()))
                raise RecipeError(f"recipe {self.name} has no option {key!r}; its mixers take {known or 'none'}")
        rules = tuple(
            rule.model_copy(update={"options": {**rule.options, **_only(options, taken[rule.mixer])}})
            for rule in self.rules
        )
        return self.model_copy(update={"rules": rules})

    def plan(self, sites: Sequence[Site]) -> Plan:
        """What each matched site becomes, and why."""
        return Plan(recipe=self.name, entries=tuple(self._entry(site) for site in sites))

    def _entry(self, site: Site) -> PlanEntry:
        rule = next((rule for rule in reversed(self.rules) if rule.applies(site.index)), None)
        if rule is None:
            return PlanEntry(site=site.index, module=site.module, mixer="keep", reason="no rule of the recipe applies")
        sliding = site.attention.mask.size if site.attention.mask.kind == "sliding" else 0
        if sliding:
            return _sliding_entry(site, sliding)
        refusal = _refusal(rule, site)
        if refusal is not None:
            return PlanEntry(site=site.index, module=site.module, mixer="keep", reason=refusal)
        reason = f"rule {rule.layers}" if rule.layers != "all" else "recipe"
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
