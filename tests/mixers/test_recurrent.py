"""Liger, GLA, DeltaNet, Gated DeltaNet, Mamba-2, Lightning: their starts, and their docstrings' formulas in loops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import normalize, softplus

from linearize.errors import RecipeError
from linearize.mixers import Mixer, build_mixer
from tests.mixers.test_starts import DV, SCALE, D, G, H, distances, inputs, output, softmax, spec

RECURRENT = ["liger", "gla", "deltanet", "gated_deltanet", "mamba2", "lightning"]
OPTIONS = {
    "gla": {"rank": 2, "features": 3},
    "deltanet": {"conv": 3, "output_gate": True},
    "mamba2": {"conv": 3, "output_gate": True},
    "lightning": {"fit_decay": True},
}
WINDOW, LENGTH = 3, 8


@pytest.mark.parametrize("name", RECURRENT)
@pytest.mark.parametrize("length", [1, 4, 12])
@pytest.mark.parametrize("sinks", [0, 2])
def test_recurrent_mixers_start_as_window_softmax(name: str, length: int, sinks: int) -> None:
    x, distance = inputs(length), distances(length)
    seen = (distance >= 0) & ((distance < 4) | (torch.arange(length)[None, :] < sinks))
    actual = output(build_mixer(name, spec(), {**OPTIONS.get(name, {}), "window": 4, "sinks": sinks}), x)
    torch.testing.assert_close(actual, softmax(x, seen), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in RECURRENT if name != "liger"])
def test_without_a_window_they_start_at_zero_and_preparing_wakes_them(name: str) -> None:
    x = inputs(24)
    target = softmax(x, distances(24) >= 0)
    mixer = build_mixer(name, spec(), {"window": 0})
    assert not output(mixer, x).any()
    assert not any(tensor.name.startswith("ring") for tensor in mixer.state())
    with torch.no_grad():
        mixer.prepare([x[key] for key in ("query", "key", "value", *mixer.needs)], target)
    assert (output(mixer, x) - target).square().sum() < target.square().sum()


@pytest.mark.parametrize("name", RECURRENT)
def test_preparing_is_the_least_squares_of_every_head(name: str) -> None:
    """The error of each head is no larger than at the start, and its residual is orthogonal to both branches."""
    x = inputs(24)
    target = softmax(x, distances(24) >= 0)
    mixer = build_mixer(name, spec(), {**OPTIONS.get(name, {}), "window": 4})
    before = (output(mixer, x) - target).square().sum((0, 2, 3))
    given = [x[key] for key in ("query", "key", "value", *mixer.needs)]
    with torch.no_grad():
        mixer.prepare(given, target)
    residual = output(mixer, x) - target
    assert bool((residual.square().sum((0, 2, 3)) <= before * 1.0001).all())
    window = softmax(x, (distances(24) >= 0) & (distances(24) < 4))
    overlap = (residual * window).sum((0, 2, 3)) / window.square().sum((0, 2, 3))
    assert overlap.abs().max() < 1e-3


def test_the_published_start_of_liger_is_an_option() -> None:
    x = inputs(9)
    halves = output(build_mixer("liger", spec(), {"window": 4, "near": 0.5, "far": 0.5}), x)
    near = output(build_mixer("liger", spec(), {"window": 4}), x)
    far = output(build_mixer("liger", spec(), {"window": 4, "near": 0, "far": 1}), x)
    torch.testing.assert_close(halves, 0.5 * near + 0.5 * far)
    assert (halves - near).abs().max() > 0.05


@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_mixers_are_their_formulas(name: str) -> None:
    """y = alpha Ynear + beta Yfar, token by token in float64, with moved parameters."""
    mixer = build_mixer(name, spec(), {**OPTIONS.get(name, {}), "window": WINDOW})
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.5 * torch.randn(parameter.shape, generator=generator))
    x = {key: tensor.double() for key, tensor in inputs(LENGTH, batch=1).items()}
    p = {key: tensor.detach().double() for key, tensor in mixer.named_parameters()}
    q, k, v, hidden = (x[key][0] for key in ("query_unrotated", "key_unrotated", "value", "hidden"))
    near = softmax(x, (distances(LENGTH) >= 0) & (distances(LENGTH) < WINDOW))[0]
    far = torch.stack([FORMULAS[name](q[h], k[h // (H // G)], v[h // (H // G)], hidden, p, h) for h in range(H)])
    expected = p["alpha"][:, None, None] * near + p["beta"][:, None, None] * far
    actual = output(mixer, {key: tensor.float() for key, tensor in x.items()})[0]
    torch.testing.assert_close(actual.double(), expected, rtol=1e-4, atol=1e-4)


Parameters = dict[str, Tensor]


def decayed(q: Tensor, k: Tensor, v: Tensor, gates: Tensor) -> Tensor:
    """S_i = diag(gate_i) S_{i-1} + k_i v_i^T, read with q_i; gates [T,K] or [T,1]."""
    state, rows = torch.zeros(k.shape[1], DV, dtype=torch.float64), []
    for i in range(LENGTH):
        state = gates[i][:, None] * state + torch.outer(k[i], v[i])
        rows.append(q[i] @ state)
    return torch.stack(rows)


def liger(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, p: Parameters, h: int) -> Tensor:
    return decayed(q.softmax(-1), k.softmax(-1), v, torch.sigmoid(k) ** (1 / 16))


def gla(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, p: Parameters, h: int) -> Tensor:
    gates = torch.sigmoid(hidden @ p["gate_in.weight"].T @ p["gate_out.weight"].T + p["gate_out.bias"]) ** (1 / 16)
    g = h // (H // G)
    readers, writers = (q @ p["query_map"][h]).softmax(-1), (k @ p["key_map"][g]).softmax(-1)
    return decayed(readers, writers, v, gates.unflatten(-1, (G, -1))[:, g])


def lightning(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, p: Parameters, h: int) -> Tensor:
    rate = p["log_rate"][h // (H // G)].exp()
    return decayed(q.softmax(-1), k.softmax(-1), v, torch.exp(-rate).expand(LENGTH, 1))


def convolved(x: Tensor, weight: Tensor) -> Tensor:
    """weight [dim, 3], the newest token first."""
    rows = [sum(weight[:, n] * x[i - n] for n in range(3) if i >= n) for i in range(LENGTH)]
    return torch.stack(rows)  # type: ignore[arg-type]


def output_gate(hidden: Tensor, p: Parameters, h: int) -> Tensor:
    return 2 * torch.sigmoid(hidden @ p["gate.weight"].T).unflatten(-1, (H, DV))[:, h]


def mamba2(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, p: Parameters, h: int) -> Tensor:
    g = h // (H // G)
    q, k, v = (convolved(*pair) for pair in zip((q, k, v), _convolutions(p, h), strict=True))
    step = softplus(hidden @ p["time_step.weight"][g] + p["time_step.bias"][g])[:, None]
    far = SCALE * decayed(q, k * step, v, torch.exp(-step * p["log_rate"][g].exp())) + p["skip"][h] * v
    return far * output_gate(hidden, p, h)


def _convolutions(p: Parameters, h: int) -> tuple[Tensor, Tensor, Tensor]:
    g = h // (H // G)
    return p["conv_q.weight"][h], p["conv_k.weight"][g], p["conv_v.weight"][g]


def corrected(q: Tensor, k: Tensor, v: Tensor, write: Tensor, gates: Tensor) -> Tensor:
    """The delta rule on normalised q, k."""
    q, k = normalize(q, dim=-1), normalize(k, dim=-1)
    state, rows = torch.zeros(D, DV, dtype=torch.float64), []
    for i in range(LENGTH):
        state = gates[i] * state
        state = state + torch.outer(k[i], write[i] * (v[i] - k[i] @ state))
        rows.append(q[i] @ state)
    return torch.stack(rows)


def _write(hidden: Tensor, p: Parameters, h: int) -> Tensor:
    g = h // (H // G)
    return torch.sigmoid(hidden @ p["write.weight"][g] + p["write.bias"][g])


def deltanet(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, p: Parameters, h: int) -> Tensor:
    q, k, v = (convolved(*pair) for pair in zip((q, k, v), _convolutions(p, h), strict=True))
    return corrected(q, k, v, _write(hidden, p, h), torch.ones(LENGTH)) * output_gate(hidden, p, h)


def gated_deltanet(q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, p: Parameters, h: int) -> Tensor:
    g = h // (H // G)
    gates = torch.exp(-p["log_rate"][g].exp() * softplus(hidden @ p["decay.weight"][g] + p["decay.bias"][g]))
    return corrected(q, k, v, _write(hidden, p, h), gates)


FORMULAS = {
    "liger": liger, "gla": gla, "lightning": lightning, "mamba2": mamba2,
    "deltanet": deltanet, "gated_deltanet": gated_deltanet,
}  # fmt: skip


def test_lightning_decays_are_those_of_the_paper_and_constant_unless_fitted() -> None:
    fixed, fitted = build_mixer("lightning", spec(), {}), build_mixer("lightning", spec(), {"fit_decay": True})
    torch.testing.assert_close(fixed.log_rate.exp(), torch.tensor([2.0**-4, 2.0**-8]))
    assert "log_rate" not in dict(fixed.named_parameters())
    assert "log_rate" in dict(fitted.named_parameters())
    assert "log_rate" in fixed.state_dict()


@pytest.mark.parametrize(("conv", "bytes_more"), [(0, 0), (4, 3 * 4 * (H * D + G * D + G * DV))])
def test_the_state_of_a_recurrence_is_one_matrix_a_kv_head_and_the_convolutions_tokens(
    conv: int, bytes_more: int
) -> None:
    mixer: Mixer = build_mixer("mamba2", spec(), {"window": 0, "conv": conv})
    assert sum(tensor.bytes(1) for tensor in mixer.state()) == 4 * G * D * DV + bytes_more


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gla", {"window": 0, "sinks": 2}, "sinks belong to a window"),
        ("liger", {"pool": 3}, "pool must divide the head dim 4, which 3 does not"),
        ("mamba2", {"conv": 1}, r"conv must be 0 \(none\) or at least 2 tokens, not 1"),
        ("deltanet", {"window": -1}, "window must be at least 1"),
        ("lightning", {"decay": 3}, "unexpected keyword argument 'decay'"),
    ],
)
def test_options_that_make_no_sense_are_refused(name: str, options: dict, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        build_mixer(name, spec(), options)


def test_drop_is_nothing_and_has_no_state() -> None:
    mixer = build_mixer("drop", spec(), {})
    assert mixer.state() == ()
    found = output(mixer, inputs(5))
    assert found.shape == (2, H, 5, DV)
    assert not found.any()
