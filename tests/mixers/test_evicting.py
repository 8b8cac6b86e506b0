"""`q_filters` and `citrus`: the papers' rules on examples worked by hand, what the state costs, what is refused."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linearize.errors import RecipeError
from linearize.mixers import Mixer, build_mixer, mixer_class
from linearize.mixers.q_filters import query_filters
from linearize.spec import AttentionSpec, MaskSpec, Site, SiteNodes

SPEC = AttentionSpec(
    heads=4, kv_heads=2, head_dim=8, value_dim=6, hidden_dim=32, scale=8**-0.5, mask=MaskSpec("causal")
)
ONE_HEAD = dataclasses.replace(SPEC, heads=1, kv_heads=1, head_dim=1, value_dim=1, scale=1.0)
EVICTING = pytest.mark.parametrize("name", ["q_filters", "citrus"])


def row(*numbers: float) -> Tensor:
    """[1,1,T,1]: one number a token."""
    return torch.tensor(numbers, dtype=torch.float32)[None, None, :, None]


def last_output(mixer: Mixer, query: Tensor, key: Tensor, value: Tensor) -> float:
    return mixer.run([query, key, value])[0, 0, -1, 0].item()


def softmax_over(tokens: list[int], query: Tensor, key: Tensor, value: Tensor) -> float:
    """The last query over these tokens, by hand."""
    weights = {j: math.exp(query[0, 0, -1, 0].item() * key[0, 0, j, 0].item()) for j in tokens}
    return sum(weight * value[0, 0, j, 0].item() for j, weight in weights.items()) / sum(weights.values())


def test_a_filter_is_the_main_direction_of_the_queries_towards_them_and_the_mean_over_its_heads() -> None:
    """Head 0 asks along (0.6, 0.8), head 1 along (0, -1), each once the other way: the mean is (0.3, -0.1)."""
    first = torch.tensor([0.6, 0.8]) * torch.tensor([[2.0], [-1.0], [3.0]])
    second = torch.tensor([0.0, -1.0]) * torch.tensor([[1.0], [5.0], [-2.0]])
    found = query_filters(torch.stack([first, second])[None], kv_heads=1)
    torch.testing.assert_close(found, torch.tensor([[0.3, -0.1]], dtype=torch.float64))


def test_q_filters_keeps_the_keys_with_the_largest_projection() -> None:
    """f = 1 as all queries are positive; blocks of 1. Of the tokens 0 .. 3 that left, 1 and 2 have the largest keys."""
    query, key, value = row(1, 2, 1, 1, 2, 0.5), row(-1, 3, 2, 1, 0, 1), row(1, 2, 4, 8, 16, 32)
    mixer = build_mixer("q_filters", ONE_HEAD, {"window": 1, "keep": 2})
    mixer.prepare([query, key, value], value)
    found = last_output(mixer, query, key, value)
    assert found == pytest.approx(softmax_over([1, 2, 4, 5], query, key, value), rel=1e-6)
    mixer.prepare([-query, key, value], value)
    found = last_output(mixer, query, key, value)
    assert found == pytest.approx(softmax_over([0, 3, 4, 5], query, key, value), rel=1e-6)


def test_citrus_keeps_what_the_last_chunk_attended_to_and_h2o_what_all_did() -> None:
    """Blocks of 1, one place. Query 2 gives token 0 a weight of 1 / (1 + e^2 + 1) = 0.107 and token 1 one of 0.787, so
    CItruS keeps token 1. Over all queries token 0 has 1 (its own) + 0.982 (of query 1) + 0.107 against 0.018 + 0.787
    of token 1, so H2O keeps token 0."""
    query, key, value = row(1, -2, 1, 1), row(0, 2, 0, 1), row(1, 2, 4, 8)
    for memory, kept in ((0.0, 1), (1.0, 0)):
        mixer = build_mixer("citrus", ONE_HEAD, {"window": 1, "keep": 1, "memory": memory})
        found = last_output(mixer, query, key, value)
        assert found == pytest.approx(softmax_over([kept, 2, 3], query, key, value), rel=1e-6)


def test_citrus_adds_the_votes_of_a_chunk_and_of_the_query_heads_of_a_kv_head() -> None:
    """Blocks of 2, one place, two query heads. Block 1 votes between tokens 0 and 1: head 0 gives token 0 the most
    (scores 0 and -2), head 1 gives token 1 far more (0 and 6); together it is token 1 that stays."""
    spec = dataclasses.replace(ONE_HEAD, heads=2, kv_heads=1)
    query = torch.stack([row(0, 0, -1, -1, 1, 1)[0, 0], row(0, 0, 3, 3, 1, 1)[0, 0]])[None]
    key, value = row(0, 2, 0.5, 0.5, 1, 1), row(1, 2, 4, 8, 16, 32)
    mixer = build_mixer("citrus", spec, {"window": 2, "keep": 1})
    found = mixer.run([query, key, value])[0, 0, -1, 0].item()
    assert found == pytest.approx(softmax_over([1, 2, 3, 4, 5], query[:, :1], key, value), rel=1e-6)


@EVICTING
def test_it_equals_the_teacher_while_all_fits_and_not_beyond(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 30, d, generator=generator) for h, d in ((4, 8), (2, 8), (2, 6)))
    exact = build_mixer("window", SPEC, {"window": 30}).run([query, key, value])
    found = build_mixer(name, SPEC, {"window": 4, "keep": 20}).run([query, key, value])
    torch.testing.assert_close(found[:, :, :24], exact[:, :, :24], rtol=0, atol=1e-5)
    assert bool(((found - exact)[:, :, 29].abs() > 1e-4).any())


@EVICTING
def test_sinks_always_stay(name: str) -> None:
    """Sinks whose key no query likes: with them the window of a StreamingLLM, without them they go first."""
    length, options = 40, {"window": 4, "keep": 8}
    query, key = torch.ones(1, 4, length, 8), torch.ones(1, 2, length, 8)
    key[:, :, :3] = -1
    value = torch.zeros(1, 2, length, 6)
    value[:, :, :3] = 1
    outputs = {}
    for sinks in (0, 3):
        mixer = build_mixer(name, SPEC, {**options, "sinks": sinks})
        mixer.prepare([query, key, value], value)
        outputs[sinks] = mixer.run([query, key, value])[0, 0, -1, 0].item()
    assert outputs[0] == 0 < outputs[3]


@EVICTING
def test_the_bytes_of_the_state_are_the_formulas_on_the_meta_device_too(name: str) -> None:
    with torch.device("meta"):
        mixer = build_mixer(name, dataclasses.replace(SPEC, dtype="bfloat16"), {"window": 16, "keep": 20})
    expected = 2 * (2 * 16 + 20) * 2 * (8 + 6) + (4 * 2 * (20 + 2 * 16) if name == "citrus" else 0)
    assert sum(tensor.bytes(3) for tensor in mixer.state()) == 3 * expected


@EVICTING
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": 30.0}, "soft-cap of 30"),
        ({"sinks": True}, "sink logits"),
        ({"alibi": (0.5, 0.5, 0.5, 0.5)}, "ALiBi"),
        ({"mask": MaskSpec("chunked", 64)}, "chunks of 64"),
    ],
)
def test_what_it_does_not_carry_is_refused_by_name(name: str, changes: dict[str, Any], reason: str) -> None:
    def site(**changed: Any) -> Site:
        return Site(0, "attn", dataclasses.replace(SPEC, **changed), SiteNodes("core", "q", "k", "v"))

    assert reason in (mixer_class(name).refusal(site(**changes)) or "")
    assert mixer_class(name).refusal(site()) is None


@EVICTING
@pytest.mark.parametrize("options", [{"window": 0}, {"keep": 0}, {"sinks": -1}, {"sinks": 3, "keep": 2}])
def test_options_out_of_range_are_refused(name: str, options: dict[str, int]) -> None:
    with pytest.raises(RecipeError, match=name):
        build_mixer(name, SPEC, options)
    if name == "citrus":
        with pytest.raises(RecipeError, match="memory"):
            build_mixer(name, SPEC, {"memory": 1.5})
