"""Latent attention: the teacher at full rank, and closed-form bases that beat truncation below it."""

import pytest
import torch

from linearize.errors import RecipeError
from linearize.mixers import build_mixer
from linearize.mixers.mla import MLA
from linearize.mixers.mla_basis import head_rotations, weighted_pca
from linearize.ops import attention
from linearize.spec import AttentionSpec, MaskSpec, RopeSpec
from tests import zoo

ROPES = {
    "half": RopeSpec(8, "half"),
    "interleaved": RopeSpec(8, "interleaved"),
    "partial": RopeSpec(4, "half"),
    "none": None,
}


def spec_of(rope: RopeSpec | None, heads: int = 4, kv_heads: int = 2) -> AttentionSpec:
    return AttentionSpec(
        heads=heads, kv_heads=kv_heads, head_dim=8, value_dim=6, hidden_dim=0, scale=0.3, mask=MaskSpec("causal"),
        rope=rope,
    )  # fmt: skip


def rotate(x: torch.Tensor, rope: RopeSpec | None) -> torch.Tensor:
    if rope is None:
        return x
    pairs, out = rope.rotated_dims // 2, x.clone()
    angles = torch.arange(x.shape[2])[:, None] * 10.0 ** -torch.arange(pairs)
    step = 2 if rope.pairs == "interleaved" else 1
    real = slice(0, rope.rotated_dims, 2) if step == 2 else slice(0, pairs)
    imaginary = slice(1, rope.rotated_dims, 2) if step == 2 else slice(pairs, rope.rotated_dims)
    a, b = x[..., real], x[..., imaginary]
    out[..., real] = a * angles.cos() - b * angles.sin()
    out[..., imaginary] = b * angles.cos() + a * angles.sin()
    return out


def draw(spec: AttentionSpec, length: int = 24, latent: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Inputs of the mixer and the teacher's output; keys and values of all heads come from `latent` numbers a token."""
    generator = torch.Generator().manual_seed(0)
    plain_q = torch.randn(2, spec.heads, length, 8, generator=generator)
    width = spec.kv_heads * 14
    both = torch.randn(2, length, latent or width, generator=generator)
    if latent:
        both = both @ torch.randn(latent, width, generator=generator)
    both = both.view(2, length, spec.kv_heads, 14).transpose(1, 2)
    plain_k, value = both[..., :8].contiguous(), both[..., 8:].contiguous()
    query, key = rotate(plain_q, spec.rope), rotate(plain_k, spec.rope)
    return [query, key, value, plain_q, plain_k], attention(query, key, value, scale=spec.scale, causal=True)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (4, 1)])
@pytest.mark.parametrize("fitted", [False, True])
def test_full_rank_equals_the_teacher(rope: RopeSpec | None, heads: int, kv_heads: int, fitted: bool) -> None:
    spec = spec_of(rope, heads, kv_heads)
    mixer = build_mixer("mla", spec, {"cache": 1.0})
    inputs, target = draw(spec)
    if fitted:
        with torch.no_grad():
            mixer.prepare(inputs, target)
    torch.testing.assert_close(mixer.run(inputs), target, rtol=1e-4, atol=1e-4)


def test_keys_and_values_of_low_rank_are_compressed_without_loss() -> None:
    """Without a rotation, 5 numbers a token are all there is: a latent of 5 holds them."""
    spec = spec_of(None)
    inputs, target = draw(spec, latent=5)
    mixer = build_mixer("mla", spec, {"rank": 5})
    with torch.no_grad():
        mixer.prepare(inputs, target)
    torch.testing.assert_close(mixer.run(inputs), target, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("rope", ROPES.values(), ids=ROPES)
def test_the_closed_form_beats_truncation(rope: RopeSpec | None) -> None:
    spec = spec_of(rope)
    inputs, target = draw(spec, length=64, latent=10)
    mixer = build_mixer("mla", spec, {"cache": 0.4})
    before = (mixer.run(inputs) - target).square().mean().item()
    with torch.no_grad():
        mixer.prepare(inputs, target)
    assert (mixer.run(inputs) - target).square().mean().item() < 0.7 * before


def test_the_cache_is_what_the_options_say() -> None:
    mixer = build_mixer("mla", spec_of(ROPES["half"]), {"cache": 0.5})
    assert isinstance(mixer, MLA)
    assert mixer.rank + mixer.rope_dims == 14
    cache, mask = mixer.state()
    assert cache.bytes(1, context=100) == 100 * 14 * 4
    assert mask.bytes(1, context=100) == 100
    exact = build_mixer("mla", spec_of(ROPES["half"]), {"rank": 9, "rope_dims": 6})
    assert isinstance(exact, MLA)
    assert (exact.rank, exact.rope_dims) == (9, 6)


def test_directions_over_heads_are_orthogonal_and_the_first_holds_most() -> None:
    spec = spec_of(ROPES["half"], 4, 4)
    _, _, _, _, key = draw(spec, latent=6)[0]
    mixing = head_rotations(spec, key.double())
    torch.testing.assert_close(mixing @ mixing.transpose(1, 2), torch.eye(4).double().expand(4, 4, 4))
    mixed = torch.einsum("cg,bgt->bct", mixing[0], key[..., 0].double()).square().sum((0, 2))
    other = torch.einsum("cg,bgt->bct", mixing[0], key[..., 4].double()).square().sum((0, 2))
    assert (mixed + other).argmax() == 0


def test_the_weighted_pca_is_the_best_of_its_rank() -> None:
    generator = torch.Generator().manual_seed(1)
    a, b = (torch.randn(6, 6, generator=generator).double() for _ in range(2))
    covariance, weight = a @ a.T, b @ b.T

    def loss(down: torch.Tensor, up: torch.Tensor) -> float:
        rest = torch.eye(6).double() - up @ down
        return torch.trace(weight @ rest @ covariance @ rest.T).item()

    down, up = weighted_pca(covariance, weight, 2)
    for seed in range(20):
        generator.manual_seed(seed)
        other_down = down + 0.05 * torch.randn(2, 6, generator=generator)
        other_up = up + 0.05 * torch.randn(6, 2, generator=generator)
        assert loss(down, up) <= loss(other_down, other_up) + 1e-9


def test_sources_with_norms_caps_sinks_and_windows_equal_theirs_at_full_rank() -> None:
    for name in ("qwen3", "gemma2", "gpt_oss"):
        program = zoo.compiled(name, "transmla{cache=1.0}")
        assert {entry.mixer for entry in program.plan.entries} <= {"mla", "window", "keep"}
        assert any(entry.mixer == "mla" for entry in program.plan.entries)
        ids = zoo.tokens(2, 21)
        expected = zoo.source_logits(name, ids)
        assert zoo.difference(program(ids).logits, expected) < 1e-3


def test_a_rotation_that_scales_is_made_up_for_where_it_is_left_out() -> None:
    """YaRN multiplies cos and sin: with slow pairs un-rotated, the gain of q and k must not be lost."""
    spec = spec_of(ROPES["half"])
    _, _, value, plain_q, plain_k = draw(spec, latent=7)[0]
    still = plain_q * 1.5, plain_k * 1.5
    target = attention(*still, value, scale=0.3, causal=True)
    mixer = build_mixer("mla", spec, {"rank": 8, "rope_dims": 2})
    with torch.no_grad():
        mixer.prepare([*still, value, plain_q, plain_k], target)
    torch.testing.assert_close(mixer.run([*still, value, plain_q, plain_k]), target, rtol=1e-3, atol=1e-3)


def test_options_out_of_range_are_refused() -> None:
    for options in ({"cache": 0.0}, {"cache": 1.5}, {"rope_dims": 3}, {"rank": -1}):
        with pytest.raises(RecipeError, match="cache must be in"):
            build_mixer("mla", spec_of(None), options)
