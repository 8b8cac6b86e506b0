"""`moa`: windows by head and by an elastic rule, and how they are chosen."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from linearize.calibration.head_windows import RULES, choose_windows, hull, solve
from linearize.calibration.teacher import TeacherStream
from linearize.errors import RecipeError
from linearize.mixers import build_mixer, mixer_class
from linearize.mixers.moa import head_windows
from linearize.ops import attention
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.progress import Progress
from linearize.spec import AttentionSpec, MaskSpec, Site, SiteNodes
from tests import zoo

SPEC = AttentionSpec(heads=4, kv_heads=2, head_dim=4, value_dim=3, hidden_dim=8, scale=0.5, mask=MaskSpec("causal"))


def test_the_elastic_rule_is_start_plus_growth_times_the_length_and_at_most_all() -> None:
    assert head_windows(3, [2, 0, 64], [0.0, 0.3, 1.0], 10) == [2, 3, 10]
    assert head_windows(2, 5, 0.1, 100) == [15, 15]
    assert head_windows(2, 5, 0.1, 1000) == [105, 105]


@pytest.mark.parametrize("pieces", [[9], [4, 5], [1] * 9])
def test_every_head_sees_its_own_window(pieces: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, h, 9, d, generator=generator) for h, d in ((4, 4), (2, 4), (2, 3)))
    mixer = build_mixer("moa", SPEC, {"start": [2, 1], "growth": [0, 0.5], "context": 8, "sinks": 1})
    distance = torch.arange(9)[:, None] - torch.arange(9)
    windows = torch.tensor([2, 2, 5, 5])[:, None, None]
    seen = (distance >= 0) & ((distance < windows) | (torch.arange(9) < 1))
    expected = attention(query, key, value, seen[None], scale=0.5)
    state, outputs, start = [tensor.zeros(2) for tensor in mixer.state()], [], 0
    for size in pieces:
        part = slice(start, start + size)
        mask, ranks = torch.ones(2, size, dtype=torch.bool), torch.arange(9)[part].expand(2, -1)
        output, *state = mixer(*(x[:, :, part] for x in (query, key, value)), mask, ranks, *state)
        outputs.append(output)
        start += size
    torch.testing.assert_close(torch.cat(outputs, 2), expected, rtol=0, atol=1e-5)


def test_its_bytes_are_those_of_the_windows_on_the_meta_device_too() -> None:
    with torch.device("meta"):
        mixer = build_mixer("moa", SPEC, {"start": [2, 30], "context": 64})
    assert sum(tensor.bytes(1) for tensor in mixer.state()) == (2 + 30) * (4 * (4 + 3) + 1)


def test_lists_that_do_not_fit_and_empty_windows_are_refused() -> None:
    site = Site(0, "attn", SPEC, SiteNodes("core", "q", "k", "v"))
    moa = mixer_class("moa")
    assert "3 windows for 2 kv heads" in (moa.refusal_with(site, {"start": [1, 2, 3]}) or "")
    assert moa.refusal_with(site, {"start": [1, 2]}) is None
    capped = dataclasses.replace(site, attention=dataclasses.replace(SPEC, softcap=30.0))
    assert "soft-cap of 30" in (moa.refusal_with(capped, {}) or "")
    for options in ({"start": [1, 2, 3]}, {"start": 0}, {"start": -1}, {"context": 0}):
        with pytest.raises(RecipeError, match="moa"):
            build_mixer("moa", SPEC, options)


def test_the_hull_leaves_out_what_a_mixture_of_others_beats() -> None:
    """(keys, error): 4 keys lie above the line from 2 to 8, 16 take nothing away."""
    assert hull([(2, 1.0), (4, 0.9), (8, 0.1), (16, 0.1), (2, 2.0)]) == [0, 2]


def test_keys_go_where_each_takes_most_error_away() -> None:
    """By hand: head b gains 0.2 a key, then head a 0.1, then b 0.01; 12 keys pay for the first two."""
    options = {
        (0, 0): [(2, 1.0), (6, 0.6)],
        (0, 1): [(2, 1.0), (6, 0.2), (10, 0.16)],
    }
    assert solve(options, 8) == {(0, 0): 0, (0, 1): 1}
    assert solve(options, 12) == {(0, 0): 1, (0, 1): 1}
    assert solve(options, 99) == {(0, 0): 1, (0, 1): 2}


def test_windows_chosen_on_data_keep_within_the_mean_and_more_keys_err_less() -> None:
    teacher = run_pipeline(zoo.captured("llama"), [RaiseAttention()])
    sites = [site.index for site in teacher.matched]
    total = {}
    for mean in (24, 64):
        rules = choose_windows(TeacherStream(teacher, [zoo.tokens(2, 48)]), sites, 256, mean, 0, Progress(False))
        found = [rule for site in sites for rule in rules[site]]
        assert set(found) <= set(RULES)
        assert len(found) == sum(site.attention.kv_heads for site in teacher.matched)
        total[mean] = sum(head_windows(1, *rule, 256)[0] for rule in found) / len(found)
        assert total[mean] <= mean
    assert total[24] < total[64]
