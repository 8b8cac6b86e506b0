"""The mixer `slots`: what it refuses, what its state costs, and that it becomes better with more slots."""

import dataclasses

import pytest
import torch

from linearize.errors import RecipeError
from linearize.mixers import build_mixer, mixer_class
from linearize.spec import AttentionSpec, MaskSpec, Site, SiteNodes

SPEC = AttentionSpec(
    heads=4, kv_heads=2, head_dim=8, value_dim=6, hidden_dim=32, scale=8**-0.5, mask=MaskSpec("causal")
)


def site(**changes) -> Site:
    return Site(0, "attn", dataclasses.replace(SPEC, **changes), SiteNodes("core", "q", "k", "v"))


def test_the_state_stays_at_kv_heads_and_its_bytes_are_the_formulas() -> None:
    mixer = build_mixer("slots", SPEC, {"window": 16, "slots": 20})
    ring, slots = 2 * 16 * 2 * (8 + 6), 20 * 2 * (8 + 6 + 1)
    assert sum(tensor.bytes(3) for tensor in mixer.state()) == 3 * 4 * (ring + slots)


def test_a_bfloat16_source_keeps_its_ring_in_bfloat16_and_its_slots_in_float32() -> None:
    mixer = build_mixer("slots", dataclasses.replace(SPEC, dtype="bfloat16"), {"window": 4, "slots": 8})
    dtypes = {tensor.name: tensor.dtype for tensor in mixer.state()}
    assert dtypes["ring_k"] == torch.bfloat16
    assert dtypes["slot_k"] == dtypes["slot_n"] == torch.float32


def test_more_slots_and_more_rounds_come_closer_to_the_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 200, d, generator=generator) for h, d in ((4, 8), (2, 8), (2, 6)))
    exact = build_mixer("slots", SPEC, {"window": 8, "slots": 200}).run([query, key, value])
    errors = [
        (build_mixer("slots", SPEC, {"window": 8, "slots": c, "rounds": r}).run([query, key, value]) - exact)
        .square().mean().item()
        for c, r in ((4, 1), (16, 1), (64, 1), (64, 4))
    ]  # fmt: skip
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] > 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"softcap": 30.0}, "soft-cap of 30"),
        ({"sinks": True}, "sink logits"),
        ({"alibi": (0.5, 0.5, 0.5, 0.5)}, "ALiBi"),
        ({"mask": MaskSpec("chunked", 64)}, "chunks of 64"),
    ],
)
def test_what_it_does_not_carry_is_refused_by_name(changes, reason) -> None:
    assert reason in (mixer_class("slots").refusal(site(**changes)) or "")
    assert mixer_class("slots").refusal(site()) is None


@pytest.mark.parametrize("options", [{"window": 0}, {"slots": 0}, {"rounds": 0}, {"sinks": 3, "slots": 5}])
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(RecipeError, match="must be at least"):
        build_mixer("slots", SPEC, options)
