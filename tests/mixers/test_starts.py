"""What each mixer says that it equals before fitting, and the formulas of its docstring written out in loops."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from linearize.errors import RecipeError
from linearize.mixers import Mixer, build_mixer, mixer_class, mixer_names
from linearize.ops import attention
from linearize.spec import AttentionSpec, MaskSpec, Site, SiteNodes

H, G, D, DV, HIDDEN, SCALE = 4, 2, 4, 3, 5, 0.7


def spec(**changes: object) -> AttentionSpec:
    plain = AttentionSpec(
        heads=H, kv_heads=G, head_dim=D, value_dim=DV, hidden_dim=HIDDEN, scale=SCALE, mask=MaskSpec("causal")
    )
    return replace(plain, **changes)  # type: ignore[arg-type]


def inputs(length: int, batch: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(length)
    shapes = {
        "query": (batch, H, length, D), "key": (batch, G, length, D), "value": (batch, G, length, DV),
        "query_unrotated": (batch, H, length, D), "key_unrotated": (batch, G, length, D),
        "hidden": (batch, length, HIDDEN),
    }  # fmt: skip
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def output(mixer: Mixer, x: dict[str, Tensor]) -> Tensor:
    batch, _, length, _ = x["query"].shape
    mask, positions = torch.ones(batch, length, dtype=torch.bool), torch.arange(length).expand(batch, length)
    state = [tensor.zeros(batch) for tensor in mixer.state()]
    needed = [x[name] for name in ("query", "key", "value", *mixer.needs)]
    with torch.no_grad():
        return mixer(*needed, mask, positions, *state)[0]


def softmax(x: dict[str, Tensor], seen: Tensor, sinks: Tensor | None = None) -> Tensor:
    return attention(x["query"], x["key"], x["value"], seen, sinks, scale=SCALE)


def distances(length: int) -> Tensor:
    return torch.arange(length)[:, None] - torch.arange(length)[None, :]


@pytest.mark.parametrize("length", [1, 3, 4, 5, 12])
@pytest.mark.parametrize("sinks", [0, 1, 3])
def test_window_equals_softmax_with_its_mask(length: int, sinks: int) -> None:
    x, distance = inputs(length), distances(length)
    seen = (distance >= 0) & ((distance < 4) | (torch.arange(length)[None, :] < sinks))
    actual = output(build_mixer("window", spec(), {"window": 4, "sinks": sinks}), x)
    torch.testing.assert_close(actual, softmax(x, seen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["lolcats", "moments"])
@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("length", [1, 3, 4])
def test_one_normaliser_equals_the_teacher_inside_the_window(name: str, length: int, sinks: int) -> None:
    x = inputs(length)
    actual = output(build_mixer(name, spec(), {"window": 4, "sinks": sinks}), x)
    torch.testing.assert_close(actual, softmax(x, distances(length) >= 0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("length", [5, 12])
def test_lolcats_starts_as_window_softmax_beyond_its_window(length: int, sinks: int) -> None:
    x, distance = inputs(length), distances(length)
    seen = (distance >= 0) & ((distance < 4) | (torch.arange(length)[None, :] < sinks))
    actual = output(build_mixer("lolcats", spec(), {"window": 4, "sinks": sinks}), x)
    torch.testing.assert_close(actual, softmax(x, seen), rtol=0, atol=1e-3)


@pytest.mark.parametrize("name", ["lolcats", "lizard", "moments"])
def test_preparing_lowers_the_error_of_every_head_or_leaves_it(name: str) -> None:
    """Without gradients, on a teacher that attends to everything."""
    x = inputs(24)
    target = softmax(x, distances(24) >= 0)
    mixer = build_mixer(name, spec(), {"window": 4})
    before = (output(mixer, x) - target).square().sum((0, 2, 3))
    with torch.no_grad():
        mixer.prepare([x[key] for key in ("query", "key", "value", *mixer.needs)], target)
    after = (output(mixer, x) - target).square().sum((0, 2, 3))
    assert bool((after.unflatten(0, (G, -1)).sum(-1) <= before.unflatten(0, (G, -1)).sum(-1) * 1.0001).all())
    assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("length", [1, 4, 9])
@pytest.mark.parametrize("count", [1, 4])
def test_lizard_starts_as_window_softmax_with_sink_logits(length: int, count: int) -> None:
    x, distance = inputs(length), distances(length)
    sinks = torch.full((H,), -6.0 + math.log(count))
    actual = output(build_mixer("lizard", spec(), {"window": 4, "sink_logits": count}), x)
    expected = softmax(x, (distance >= 0) & (distance < 4), sinks)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("length", [1, 5, 30])
@pytest.mark.parametrize(
    ("mask", "softcap"), [(MaskSpec("causal"), 0.0), (MaskSpec("sliding", 3), 0.0), (MaskSpec("causal"), 2.0)]
)
def test_keep_equals_the_teacher(length: int, mask: MaskSpec, softcap: float) -> None:
    x, distance = inputs(length), distances(length)
    seen = (distance >= 0) & (distance < (mask.size or length))
    actual = output(build_mixer("keep", spec(mask=mask, softcap=softcap), {}), x)
    expected = attention(x["query"], x["key"], x["value"], seen, scale=SCALE, softcap=softcap)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_lolcats_is_its_formula() -> None:
    """y_i of the module docstring, token by token in float64, with moved parameters and 2 sinks."""
    window, sinks, length = 3, 2, 9
    mixer = build_mixer("lolcats", spec(), {"window": window, "sinks": sinks, "features": 5})
    _move(mixer)
    x = {name: tensor.double() for name, tensor in inputs(length, batch=1).items()}
    parameters = {name: parameter.detach().double() for name, parameter in mixer.named_parameters()}
    query_map, key_map, omega = (parameters[name] for name in ("query_map", "key_map", "omega"))
    expected = torch.zeros(1, H, length, DV, dtype=torch.float64)
    for h in range(H):
        g, c = h // (H // G), torch.exp(omega[h])
        for i in range(length):
            near = [j for j in range(i + 1) if j > i - window or j < sinks]
            scores = torch.stack([SCALE * x["query"][0, h, i] @ x["key"][0, g, j] for j in near])
            weights = c * (scores - scores.max()).exp()
            far = list(range(sinks, i - window + 1))
            reader = _hedgehog(x["query"][0, h, i] @ query_map[h])
            more = [reader @ _hedgehog(x["key"][0, g, j] @ key_map[g]) for j in far]
            values = torch.stack([x["value"][0, g, j] for j in [*near, *far]])
            all_weights = torch.cat([weights, torch.stack(more)]) if far else weights
            expected[0, h, i] = all_weights @ values / all_weights.sum()
    actual = output(mixer, {name: tensor.float() for name, tensor in x.items()})
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def test_lizard_is_its_formula() -> None:
    """y = beta Yg + alpha Ya of the module docstring, token by token in float64."""
    window, length = 3, 8
    mixer = build_mixer("lizard", spec(), {"window": window, "sink_logits": 2, "features": 3})
    _move(mixer)
    x = {name: tensor.double() for name, tensor in inputs(length, batch=1).items()}
    p = {name: tensor.detach().double() for name, tensor in mixer.named_parameters()}
    gates = torch.sigmoid(x["hidden"][0] @ p["gate.weight"].T + p["gate.bias"])
    expected = torch.zeros(1, H, length, DV, dtype=torch.float64)
    for h in range(H):
        g = h // (H // G)
        state, norm = torch.zeros(6, DV, dtype=torch.float64), torch.zeros(6, dtype=torch.float64)
        for i in range(length):
            writer = _exponential(x["key_unrotated"][0, g, i] @ p["key_map"][g])
            state = gates[i, g] * state + writer[:, None] * x["value"][0, g, i]
            norm = gates[i, g] * norm + writer
            reader = _exponential(x["query_unrotated"][0, h, i] @ p["query_map"][h])
            near = range(max(0, i - window + 1), i + 1)
            weights = torch.stack([(SCALE * x["query"][0, h, i] @ x["key"][0, g, j]).exp() for j in near])
            values = torch.stack([x["value"][0, g, j] for j in near])
            soft = weights @ values / (weights.sum() + p["sink_logits"][h].exp().sum())
            expected[0, h, i] = p["beta"][h] * (reader @ state) / (reader @ norm) + p["alpha"][h] * soft
    actual = output(mixer, {name: tensor.float() for name, tensor in x.items()})
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


def _move(mixer: Mixer) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():
            start = 0 if name == "omega" else parameter  # the far field starts muted
            parameter.copy_(start + 0.5 * torch.randn(parameter.shape, generator=generator))


def _hedgehog(projected: Tensor) -> Tensor:
    return torch.cat([projected.softmax(-1), (-projected).softmax(-1)])


def _exponential(projected: Tensor) -> Tensor:
    return torch.cat([projected.exp(), (-projected).exp()])


# ---- what a mixer does not take --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["window", "lolcats", "moments", "lizard", "liger", "mamba2"])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"softcap": 30.0}, "does not carry the soft-cap of 30"), ({"sinks": True}, "does not carry the teacher's sink")],
)
def test_features_that_would_be_lost_are_refused(name: str, changes: dict, reason: str) -> None:
    nodes = SiteNodes("o", "q", "k", "v", hidden="x", query_unrotated="q0", key_unrotated="k0")
    refusal = mixer_class(name).refusal(Site(0, "attn", spec(**changes), nodes))
    assert refusal is not None
    assert reason in refusal
    assert mixer_class(name).refusal(Site(0, "attn", spec(), nodes)) is None


def test_a_need_that_was_not_recovered_is_named_with_the_near_miss() -> None:
    site = Site(0, "attn", spec(), SiteNodes("o", "q", "k", "v", hidden="x"), near_misses=("rope not recovered: why",))
    refusal = mixer_class("lizard").refusal(site)
    assert refusal == "lizard needs query_unrotated, key_unrotated, not recovered here (rope not recovered: why)"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("window", {"window": 0}, "window must be at least 1"),
        ("window", {"sinks": -1}, "sinks at least 0"),
        ("lizard", {"sink_logits": 0}, "sink_logits must be at least 1"),
        ("lolcats", {"wndow": 3}, "unexpected keyword argument 'wndow'"),
        ("lolcats", {"window": "wide"}, "does not take the options"),
        ("lolcats", {"features": -2}, "does not take the options"),
        ("keep", {"window": 3}, "unexpected keyword argument 'window'"),
        ("mamba", {}, "no mixer named 'mamba'; there are .*keep, .*lizard, .*lolcats, .*window"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_mixer(name, spec(), options)


def test_every_mixer_says_what_it_starts_as() -> None:
    assert {"keep", "lizard", "lolcats", "mla", "window"} <= set(mixer_names())
    assert all(mixer_class(name).starts_as for name in mixer_names())
