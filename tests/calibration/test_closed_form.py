"""Ridge regression of a mixer's linear part on moments that are summed batch by batch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from linearize.calibration.closed_form import DAMPINGS, Moments, fit_linear, read, solved, write
from linearize.calibration.fit import output_error, parameter_groups
from linearize.calibration.teacher import TeacherStream
from linearize.mixers import build_mixer
from linearize.mixers.branches import linear_terms
from linearize.mixers.linear_part import HeadMaps
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.program import Program
from tests import zoo

MAPPED = ["lolcats", "lizard", "liger", "gla", "deltanet", "gated_deltanet", "mamba2", "lightning"]
H, N, TERMS, DV = 3, 200, 2, 4


def teacher() -> Program:
    return run_pipeline(zoo.captured("llama"), [RaiseAttention()])


def data(seed: int, count: int = N) -> tuple[Tensor, Tensor]:
    """x [H,N,n dv+1] with a column of ones, and y that is linear in it but for a little noise."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(H, count, TERMS * DV, dtype=torch.float64, generator=generator)
    x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
    truth = torch.randn(H, TERMS * DV + 1, DV, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return x, x @ truth + 0.1 * torch.randn(H, count, DV, dtype=torch.float64, generator=generator)


def test_moments_of_parts_add_up_to_those_of_the_whole() -> None:
    x, y = data(0)
    parts = Moments.of(x[:, :70], y[:, :70], TERMS) + Moments.of(x[:, 70:], y[:, 70:], TERMS)
    whole = Moments.of(x, y, TERMS)
    for name in ("gram", "cross", "power"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-10)


def test_the_error_of_a_map_is_read_off_the_moments() -> None:
    x, y = data(1)
    maps = torch.randn(H, TERMS * DV + 1, DV, dtype=torch.float64)
    torch.testing.assert_close(Moments.of(x, y, TERMS).errors(maps), (y - x @ maps).square().sum((1, 2)))


@pytest.mark.parametrize("damping", [1e-3, 1.0])
def test_the_solution_is_the_ridge_regression_around_the_start(damping: float) -> None:
    """The gradient of |y - x W|^2 + sum D (W - W_0)^2 is 0 there."""
    x, y = data(2)
    start = torch.randn(H, TERMS * DV + 1, DV, dtype=torch.float64)
    found = Moments.of(x, y, TERMS).solve(start, damping)
    means = [x[..., :DV].square().sum(1).mean(-1), x[..., DV:-1].square().sum(1).mean(-1)]
    ridge = torch.stack([*[means[0]] * DV, *[means[1]] * DV, torch.full((H,), float(N))], dim=1).double()
    slope = x.mT @ (x @ found - y) + damping * ridge[..., None] * (found - start)
    assert slope.abs().max() < 1e-7
    assert torch.equal(Moments.of(x, y, TERMS).solve(start, float("inf")), start)


def test_each_head_takes_the_damping_that_is_best_on_what_was_kept_out() -> None:
    """A head of noise stays at its start, one of signal does not."""
    x, y = data(3, 30)
    y[0] = torch.randn(30, DV, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    held_x, held_y = data(4, 400)
    held_y[0] = torch.randn(400, DV, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    train, held = Moments.of(x, y, TERMS), Moments.of(held_x, held_y, TERMS)
    found = solved(train, held, torch.zeros(H, TERMS * DV + 1, DV, dtype=torch.float64), full=True)
    least = min(held.errors(train.solve(torch.zeros_like(found), damping))[0] for damping in DAMPINGS[:3])
    assert held.errors(found)[0] < least
    assert (found[1:] - solved(train, train, found, full=True)[1:]).abs().max() < 0.1
    assert held.errors(found)[1] < 0.05 * held.power[1]


@pytest.mark.parametrize("name", MAPPED)
@pytest.mark.parametrize("maps", [False, True])
def test_the_output_is_linear_in_the_terms(name: str, maps: bool) -> None:
    program = teacher()
    site = program.matched[0]
    mixer = build_mixer(name, site.attention, {"window": 4, "maps": maps})
    part = mixer.linear_part()
    if part is None:
        assert (name, maps) == ("lolcats", False)
        return
    inputs, _ = TeacherStream(program, [zoo.tokens(2, 16)]).site_values(site, mixer.needs, 0)
    with torch.no_grad():
        if isinstance(part, HeadMaps):
            moved = [tensor + 0.3 * torch.randn(tensor.shape) for tensor in part.read()]
            part.write(*moved)
        else:
            part.weights[0].mul_(1.7)
        before = read(part)
        terms = linear_terms(mixer, part, inputs).double()
        assert torch.equal(read(part), before)
        x = terms.permute(2, 1, 3, 0, 4).flatten(3)
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        expected = torch.einsum("hbtk,hkd->bhtd", x, before)
        torch.testing.assert_close(mixer.run(inputs).double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lizard", "deltanet", "lolcats"])
def test_maps_start_as_the_mixer_without_them(name: str) -> None:
    program = teacher()
    site = program.matched[0]
    plain, mapped = (build_mixer(name, site.attention, {"window": 4, "maps": maps}) for maps in (False, True))
    inputs, _ = TeacherStream(program, [zoo.tokens(2, 16)]).site_values(site, plain.needs, 0)
    with torch.no_grad():
        torch.testing.assert_close(plain.run(inputs), mapped.run(inputs))


@pytest.mark.parametrize("name", ["lizard", "lolcats", "gla"])
def test_maps_come_closer_than_numbers(name: str) -> None:
    """On the data that they were found on, the sum of squares can only fall."""
    program = teacher()
    site, stream = program.matched[0], TeacherStream(program, [zoo.tokens(8, 24, seed=seed) for seed in range(5)])
    errors = []
    for maps in (False, True):
        mixer = build_mixer(name, site.attention, {"window": 4, "maps": maps})
        with torch.no_grad():
            mixer.prepare(*stream.site_values(site, mixer.needs, 0))
            fit_linear(mixer, stream, site)
        errors.append(output_error(mixer, stream, site))
    assert errors[1] < errors[0]


def test_every_part_of_a_mixture_is_solved_for() -> None:
    program = teacher()
    site, stream = program.matched[0], TeacherStream(program, [zoo.tokens(4, 24)])
    spec = site.attention
    kinds = [("lizard", {"window": 4}), ("window", {"window": 4})]
    parts = [
        {"mixer": kind, "kv_heads": [head], "options": options}
        for head, (kind, options) in zip(range(spec.kv_heads), kinds, strict=True)
    ]
    mixer = build_mixer("mixture", spec, {"parts": parts})
    before = mixer.parts[0].beta.clone()
    with torch.no_grad():
        fit_linear(mixer, stream, site)
    assert (mixer.parts[0].beta != before).all()


def test_terms_that_are_not_finite_leave_the_mixer_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    program = teacher()
    site, stream = program.matched[0], TeacherStream(program, [zoo.tokens(4, 24)])
    mixer = build_mixer("lizard", site.attention, {"window": 4})
    monkeypatch.setattr(mixer, "run", lambda inputs: torch.full_like(inputs[0], float("nan")))
    with torch.no_grad():
        fit_linear(mixer, stream, site)
    assert torch.equal(mixer.alpha, torch.ones_like(mixer.alpha))


def test_what_is_written_is_read_again() -> None:
    part = HeadMaps(H, DV, [1.0, 0.0])
    solution = torch.randn(H, TERMS * DV + 1, DV, dtype=torch.float64)
    with torch.no_grad():
        write(part, solution)
    torch.testing.assert_close(read(part), solution, rtol=1e-6, atol=1e-6)


def test_maps_move_at_a_tenth_of_the_rate() -> None:
    spec = teacher().matched[0].attention
    groups = parameter_groups(build_mixer("lizard", spec, {"window": 4, "maps": True}), 0.5)
    assert [group["lr"] for group in groups] == [0.5, 0.05]
    assert len(groups[1]["params"]) == 2
