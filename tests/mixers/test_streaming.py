"""`streaming`: StreamingLLM's rule written out with the rotation at hand, which the mixer is not given."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from linearize.errors import RecipeError
from linearize.mixers import build_mixer, mixer_class
from linearize.spec import AttentionSpec, MaskSpec, RopeSpec, Site, SiteNodes
from tests.mixers.test_forms import ROPES, rotate

SPEC = AttentionSpec(heads=4, kv_heads=2, head_dim=4, value_dim=3, hidden_dim=8, scale=0.6, mask=MaskSpec("causal"))
WINDOW, SINKS, LENGTH = 4, 2, 15


def draw() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(1, h, LENGTH, d, generator=generator) for h, d in ((4, 4), (2, 4), (2, 3)))  # type: ignore[return-value]


def at(x: Tensor, position: int, rope: str) -> Tensor:
    """One token's [heads,d] rotated as at a position."""
    return rotate(x[None, :, None], torch.tensor([position])[None, None, :, None], rope)[0, :, 0]


def by_the_paper(plain_q: Tensor, plain_k: Tensor, value: Tensor, rope: str) -> Tensor:
    """[H,T,dv]: for each token the cache as the paper has it, its entries rotated as at 0, 1, 2, ... of the cache."""
    outputs = []
    for i in range(LENGTH):
        kept = sorted({*range(min(SINKS, i + 1)), *range(max(SINKS, i - WINDOW + 1), i + 1)})
        keys = torch.stack([at(plain_k[0, :, j], place, rope) for place, j in enumerate(kept)], 1)
        query = at(plain_q[0, :, i], len(kept) - 1, rope)
        scores = 0.6 * torch.einsum("hd,hjd->hj", query, keys.repeat_interleave(2, 0))
        values = value[0][:, kept].repeat_interleave(2, 0)
        outputs.append(torch.einsum("hj,hjv->hv", scores.softmax(-1), values))
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("rope", ROPES)
def test_it_is_streaming_llm_with_positions_in_the_cache(rope: str) -> None:
    plain_q, plain_k, value = draw()
    ranks = torch.arange(LENGTH)[None, None, :, None]
    query, key = rotate(plain_q, ranks, rope), rotate(plain_k, ranks, rope)
    mixer = build_mixer("streaming", replace(SPEC, rope=ROPES[rope]), {"window": WINDOW, "sinks": SINKS})
    found = mixer.run([query, key, value, plain_q])
    torch.testing.assert_close(found[0], by_the_paper(plain_q, plain_k, value, rope), rtol=1e-4, atol=1e-5)
    window = build_mixer("window", SPEC, {"window": WINDOW, "sinks": SINKS}).run([query, key, value])
    early = WINDOW + SINKS
    torch.testing.assert_close(found[:, :, :early], window[:, :, :early], rtol=1e-4, atol=1e-5)
    assert bool(torch.allclose(found, window, atol=1e-5)) == (rope == "none")


def test_its_bytes_are_those_of_the_window_and_the_turn() -> None:
    spec = replace(SPEC, rope=ROPES["half"])
    plain = build_mixer("window", spec, {"window": WINDOW, "sinks": SINKS})
    mixer = build_mixer("streaming", spec, {"window": WINDOW, "sinks": SINKS})
    extra = sum(tensor.bytes(3) for tensor in mixer.state()) - sum(tensor.bytes(3) for tensor in plain.state())
    assert extra == 3 * 4 * 2 * 2


def test_what_it_cannot_do_is_refused_by_name() -> None:
    streaming = mixer_class("streaming")
    nodes = SiteNodes("core", "q", "k", "v", query_unrotated="q0")
    assert streaming.refusal(Site(0, "attn", SPEC, nodes)) is None
    odd = replace(SPEC, rope=RopeSpec(4, "other"))
    assert "rotates together" in (streaming.refusal(Site(0, "attn", odd, nodes)) or "")
    assert "query_unrotated" in (streaming.refusal(Site(0, "attn", SPEC, SiteNodes("core", "q", "k", "v"))) or "")
    assert "soft-cap" in (streaming.refusal(Site(0, "attn", replace(SPEC, softcap=20.0), nodes)) or "")
    for options in ({"sinks": 0}, {"window": 0}):
        with pytest.raises(RecipeError, match="streaming"):
            build_mixer("streaming", SPEC, options)
