"""The cloud of far tokens known by its moments: its formula in loops, and where it pays."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearize.mixers import Mixer, build_mixer
from linearize.ops import attention
from linearize.spec import AttentionSpec, MaskSpec

H, G, D, DV, SCALE, WINDOW = 4, 2, 4, 3, 0.7, 4


def mixer_with(sinks: int = 0) -> Mixer:
    spec = AttentionSpec(
        heads=H, kv_heads=G, head_dim=D, value_dim=DV, hidden_dim=5, scale=SCALE, mask=MaskSpec("causal")
    )
    return build_mixer("moments", spec, {"window": WINDOW, "sinks": sinks})


def draw(length: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """query, key and value, [B,heads,T,d]."""
    generator = torch.Generator().manual_seed(length)
    shapes = (batch, H, length, D), (batch, G, length, D), (batch, G, length, DV)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)  # type: ignore[return-value]


@pytest.mark.parametrize("sinks", [0, 2])
def test_moments_is_its_formula(sinks: int) -> None:
    """y_i of the module docstring, token by token in float64, with moved parameters."""
    length, mixer = 11, mixer_with(sinks)
    with torch.no_grad():
        mixer.spread.copy_(torch.tensor([1.0, 0.5, -0.3, 2.0]))
        mixer.mass.copy_(torch.tensor([0.0, -1.0, 1.5, 0.3]))
        query, key, value = draw(length)
        actual = mixer.run([query, key, value])
    expected = torch.zeros(1, H, length, DV, dtype=torch.float64)
    for h in range(H):
        k, v = key[0, h // 2].double(), value[0, h // 2].double()
        for i in range(length):
            q = SCALE * query[0, h, i].double()
            near = [j for j in range(i + 1) if j > i - WINDOW or j < sinks]
            far = list(range(sinks, i - WINDOW + 1))
            weights, values = (k[near] @ q).exp(), v[near]
            if far:
                mean_k, mean_v = k[far].mean(0), v[far].mean(0)
                covariance = ((k[far] @ q)[:, None] * v[far]).mean(0) - mean_v * (mean_k @ q)
                mass = len(far) * (mean_k @ q + mixer.mass[h].double()).exp()
                weights = torch.cat([weights, mass[None]])
                values = torch.cat([values, (mean_v + mixer.spread[h].double() * covariance)[None]])
            expected[0, h, i] = weights @ values / weights.sum()
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_where_far_keys_are_a_gaussian_cloud_the_error_is_far_below_the_windows() -> None:
    """Values that follow their keys: what a window cannot know, the covariance tells."""
    query, key, noise = draw(400, batch=2)
    map_ = torch.randn(D, DV, generator=torch.Generator().manual_seed(0))
    query, value = 0.7 * query, key @ map_ + 0.1 * noise + 1.0
    seen = torch.ones(400, 400, dtype=torch.bool).tril()
    target = attention(query, key, value, seen, scale=SCALE)
    window = build_mixer("window", mixer_with().spec, {"window": WINDOW})
    mixer = mixer_with()
    with torch.no_grad():
        start = error(mixer, [query, key, value], target)
        mixer.prepare([query, key, value], target)
        prepared = error(mixer, [query, key, value], target)
        assert start < 0.1 * error(window, [query, key, value], target)
    assert prepared < start


def error(mixer: Mixer, inputs: list[Tensor], target: Tensor) -> float:
    """Relative MSE of positions that have at least 60 tokens before them."""
    return float((mixer.run(inputs) - target)[:, :, 60:].square().mean() / target[:, :, 60:].var())


def test_the_state_is_one_matrix_a_kv_head() -> None:
    moments = mixer_with().state()[-1]
    assert moments.shape == (G, D + 1, DV + 1)


def test_without_a_cloud_preparing_leaves_the_spread() -> None:
    mixer, inputs = mixer_with(), [*draw(WINDOW)]
    with torch.no_grad():
        mixer.prepare(inputs, mixer.run(inputs))
    assert torch.equal(mixer.spread.detach(), torch.ones(H))
