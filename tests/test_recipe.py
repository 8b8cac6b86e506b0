"""Recipes: names, options, TOML files, and what they plan for a site."""

from dataclasses import replace
from pathlib import Path

import pytest

import linearize
from linearize.errors import RecipeError
from linearize.recipe import Recipe
from linearize.spec import AttentionSpec, MaskSpec, Site, SiteNodes

SPEC = AttentionSpec(heads=4, kv_heads=2, head_dim=8, value_dim=8, hidden_dim=32, scale=0.3, mask=MaskSpec("causal"))
NODES = SiteNodes("o", "q", "k", "v", hidden="x", query_unrotated="q0", key_unrotated="k0")


def sites(count: int, **changes: object) -> list[Site]:
    return [Site(i, f"layers.{i}.attn", replace(SPEC, **changes), NODES) for i in range(count)]  # type: ignore[arg-type]


def labels(recipe: Recipe, count: int = 4, **changes: object) -> list[str]:
    return [entry.label() for entry in recipe.plan(sites(count, **changes)).entries]


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def test_the_built_in_recipes_load_and_say_what_they_are() -> None:
    assert set(linearize.recipes()) >= {"lizard", "lolcats", "none", "window"}
    for name in linearize.recipes():
        recipe = Recipe.load(name)
        assert recipe.name == name
        assert recipe.description
        scores = {score.name: {0: 0.1, 1: 0.2} for score in recipe.wanted_scores()}
        assert recipe.plan(sites(2), scores).recipe == name


def test_options_in_braces_replace_those_of_the_recipe() -> None:
    plain = dict(Recipe.load("lolcats").rules[0].options)
    for name, options in (
        ("lolcats", {}),
        ("lolcats{}", {}),
        ("lolcats{window=31}", {"window": 31}),
        (" lolcats { window = 31 , sinks=4,features=16 } ", {"window": 31, "sinks": 4, "features": 16}),
    ):
        entry = Recipe.load(name).plan(sites(1)).entries[0]
        assert (entry.mixer, entry.options) == ("lolcats", {**plain, **options})
    assert Recipe.load("lolcats{window=32}").fit == Recipe.load("lolcats").fit


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lolcat", r"no recipe named 'lolcat'; there are .*lizard, .*lolcats, .*none, .*window"),
        ("lolcats{width=3}", r"lolcats has no option 'width'; its mixers take \['features', 'maps', 'sinks', "),
        ("none{window=3}", r"recipe none has no option 'window'; its mixers take none"),
        ("lolcats{window}", r"cannot read the option 'window'; write option=value"),
        ("lolcats{window=}", r"cannot read the option 'window='; write option=value"),
        ("lolcats{window=3", r"cannot read the recipe 'lolcats\{window=3'; write name or name\{option=value,...\}"),
        ("lolcats{a}{b}", "cannot read the recipe"),
        ("", "cannot read the recipe ''"),
        ("absent.toml", "cannot read the recipe absent.toml: No such file"),
    ],
)
def test_a_recipe_that_cannot_be_read_says_why(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load(name)


def test_a_toml_file_with_rules_plans_site_by_site(tmp_path: Path) -> None:
    path = written(
        tmp_path,
        """
        name = "mine"
        [[rules]]
        mixer = "lolcats"
        options = { window = 16 }
        [[rules]]
        mixer = "keep"
        layers = "every"
        n = 3
        first = 1
        [[rules]]
        mixer = "window"
        layers = "list"
        indices = [4]
        [fit]
        tokens = 100
        """,
    )
    recipe = Recipe.load(path)
    ours = "lolcats{window=16}"
    assert labels(recipe, 6) == [ours, "keep", ours, ours, "window", ours]
    assert recipe.fit.tokens == 100
    assert labels(Recipe.load(f"{path}{{window=8}}"), 2) == ["lolcats{window=8}", "keep"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name = 'x'\nrules = [", "is not TOML"),
        ("name = 'x'", "rules: Field required"),
        ("rules = []", "name: Field required"),
        ("name = 'x'\nrules = []\nfits = 1", "fits: Extra inputs are not permitted"),
        ("name = 'x'\n[[rules]]\nmixer = 'lolcats'\nlayer = 'all'", "rules.0.layer: Extra inputs"),
        ("name = 'x'\n[[rules]]\nmixer = 'lolcats'\nlayers = 'some'", "rules.0.layers: Input should be 'all', 'every'"),
        ("name = 'x'\n[[rules]]\nmixer = 'lolcats'\nn = 0", "rules.0.n: Input should be greater than or equal to 1"),
        ("name = 'x'\n[[rules]]\nmixer = 'mamba'", "no mixer named 'mamba'; there are .*keep, .*lizard"),
        ("name = 'x'\nrules = []\n[fit]\nlearning_rate = 0", "fit.learning_rate: Input should be greater than 0"),
        ("name = 'x'\nrules = []\n[fit]\nlength = 2", "fit.length: Input should be greater than or equal to 8"),
        ("name = 'x'\n[[rules]]\nmixer = 'lolcats'\noptions = { wide = 3 }", "rules.0.options: lolcats has no option"),
    ],
)
def test_a_toml_file_that_is_not_valid_names_the_field(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.load(written(tmp_path, text))


def test_a_file_that_is_not_text_is_told(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(RecipeError, match="is not TOML"):
        Recipe.load(path)


def test_a_sliding_source_is_planned_as_the_exact_window() -> None:
    plan = Recipe.load("lolcats").plan(sites(1, mask=MaskSpec("sliding", 7)))
    assert plan.entries[0].label() == "window{window=7}"
    assert "exact" in plan.entries[0].reason
    capped = Recipe.load("lolcats").plan(sites(1, mask=MaskSpec("sliding", 7), softcap=5.0)).entries[0]
    assert (capped.mixer, capped.reason) == ("keep", "sliding window with a soft-cap")


def test_a_sliding_source_that_is_to_be_dropped_is() -> None:
    scores = {"similarity": {0: 0.5, 1: 0.9}}
    plan = Recipe.load("llm-drop").plan(sites(2, mask=MaskSpec("sliding", 7)), scores)
    assert [entry.label() for entry in plan.entries] == ["window{window=7}", "drop"]


def test_a_site_that_the_mixer_cannot_replace_is_kept_with_the_reason() -> None:
    entry = Recipe.load("lolcats").plan(sites(1, softcap=5.0)).entries[0]
    assert (entry.mixer, entry.options) == ("keep", {})
    assert entry.reason == "lolcats does not carry the soft-cap of 5"
    bare = [replace(site, nodes=replace(NODES, hidden=None)) for site in sites(1)]
    assert Recipe.load("lizard").plan(bare).entries[0].reason == "lizard needs hidden, not recovered here"


def test_none_gives_a_sliding_source_its_ring_and_keeps_the_others() -> None:
    assert labels(Recipe.load("none"), 1, mask=MaskSpec("sliding", 7)) == ["window{window=7}"]
    assert labels(Recipe.load("none"), 1) == ["keep"]
