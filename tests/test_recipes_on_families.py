"""Every built-in recipe on models of three families: it compiles, its logits are finite, two pieces equal one call."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import linearize
from linearize.errors import RecipeError
from linearize.recipe import Recipe
from tests import zoo

# learned positions and fused q, k, v; grouped heads with normed q, k; soft-capped scores, which most mixers refuse
FAMILIES = ("gpt2", "qwen3", "gemma2")
SMALL = ({"window": 3}, {"slots": 2}, {"keep": 2})  # so that a dozen tokens leave the window, merge and are evicted


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("name", linearize.recipes())
def test_every_recipe_compiles_and_is_one_function(
    name: str, family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path))
    model, ids = zoo.compile_again(family, small(name), tokens=0), zoo.tokens(2, 12)
    with torch.no_grad():
        whole = model(ids).logits
        first, state = model.step(ids[:, :7])
        second, _ = model.step(ids[:, 7:], state)
    assert bool(torch.isfinite(whole).all())
    assert zoo.difference(torch.cat([first, second], dim=1), whole) <= 1e-4
    if family != "gemma2":
        planned = {rule.mixer for rule in small(name).rules} | ({"share"} if small(name).kv_sharing else set())
        assert planned >= {entry.mixer for entry in model.plan.entries}, model.plan


def small(name: str) -> Recipe:
    recipe = Recipe.load(name)
    for options in SMALL:
        try:
            recipe = recipe.with_options(**options)
        except RecipeError:
            continue
    return recipe
