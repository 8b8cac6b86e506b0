"""A layer whose heads differ: each part is its own mixer on its own heads, together one mixer."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from linearize.errors import RecipeError
from linearize.mixers import build_mixer, mixer_class
from linearize.spec import Site, SiteNodes
from tests.mixers.test_starts import H, inputs, output, spec

SPEC = spec(kv_heads=4)
PARTS = [
    {"mixer": "gla", "kv_heads": [2, 0], "options": {"window": 3}},
    {"mixer": "window", "kv_heads": [1], "options": {"window": 2}},
    {"mixer": "keep", "kv_heads": [3]},
]
GIVEN = inputs(9)
GIVEN |= {name: torch.randn(2, 4, *GIVEN[name].shape[2:]) for name in ("key", "value", "key_unrotated")}


def test_every_head_equals_its_own_mixer() -> None:
    found = output(build_mixer("mixture", SPEC, {"parts": PARTS}), GIVEN)
    for part in PARTS:
        own = output(build_mixer(part["mixer"], SPEC, part.get("options", {})), GIVEN)  # type: ignore[arg-type]
        for head in part["kv_heads"]:  # type: ignore[attr-defined]
            torch.testing.assert_close(found[:, head], own[:, head])


def test_the_state_is_that_of_the_parts() -> None:
    mixer = build_mixer("mixture", SPEC, {"parts": PARTS})
    names = [tensor.name for tensor in mixer.state()]
    assert names[:4] == ["0_ring_k", "0_ring_v", "0_ring_mask", "0_s"]
    assert len(set(names)) == len(names)
    assert mixer.state()[0].shape == (3, 2, 4)
    assert [tensor.grows is not None for tensor in mixer.state()].count(True) == 3
    assert mixer.needs == ("query_unrotated", "key_unrotated", "hidden")


def test_preparing_prepares_every_part() -> None:
    mixer = build_mixer("mixture", SPEC, {"parts": PARTS})
    target = output(build_mixer("keep", SPEC, {}), GIVEN)
    before = (output(mixer, GIVEN) - target).square().sum((0, 2, 3))
    with torch.no_grad():
        mixer.prepare([GIVEN[name] for name in ("query", "key", "value", *mixer.needs)], target)
    after = (output(mixer, GIVEN) - target).square().sum((0, 2, 3))
    assert bool((after[[0, 2]] < before[[0, 2]]).all())
    assert after[3] == before[3]


def test_a_part_that_cannot_replace_the_site_refuses_it() -> None:
    nodes = SiteNodes("o", "q", "k", "v", hidden="x")
    site = Site(0, "attn", replace(SPEC, heads=H), nodes)
    refusal = mixer_class("mixture").refusal_with(site, {"parts": PARTS})
    assert refusal == "gla needs query_unrotated, key_unrotated, not recovered here"
    kept = [{"mixer": "keep", "kv_heads": [0, 1, 2, 3]}]
    assert mixer_class("mixture").refusal_with(site, {"parts": kept}) is None


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"mixer": "keep", "kv_heads": [0, 1, 1, 2]}], r"each of the 4 kv heads once; they take \[0, 1, 1, 2\]"),
        ([{"mixer": "keep", "kv_heads": [0]}], "each of the 4 kv heads once"),
        ([{"mixer": "keep", "heads": [0, 1, 2, 3]}], r"not \['heads', 'mixer'\]"),
        ("window", "parts must be a list of tables"),
        ([{"mixer": "wndow", "kv_heads": [0, 1, 2, 3]}], "no mixer named 'wndow'"),
    ],
)
def test_parts_that_make_no_sense_are_refused(parts: object, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_mixer("mixture", SPEC, {"parts": parts})
