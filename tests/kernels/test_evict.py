"""`evict_chunk` on CPU: the step and the blocks equal the recurrence, at every place of a block."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import linearize.kernels
from linearize.ops import OPERATORS, OperatorError, evict_chunk

truth = OPERATORS["evict_chunk"].recurrence
STATE = ("ring_k", "ring_v", "kept_k", "kept_v", "mass")


def call(filtered: bool, batch: int = 2, window: int = 3, places: int = 5, **options: Any) -> dict[str, Any]:
    ring, kept = (2 * window, 2), (2, places)
    heads = {"ring_k": (*ring, 4), "ring_v": (*ring, 3), "kept_k": (*kept, 4), "kept_v": (*kept, 3)}
    state = {name: torch.zeros(batch, *shape) for name, shape in heads.items()}
    mass = None if filtered else torch.zeros(batch, 2, places + 2 * window)
    filters = torch.randn(2, 4, generator=torch.Generator().manual_seed(9)) if filtered else None
    return {**state, "mass": mass, "filters": filters, "window": window, "scale": 0.5, "memory": 0.5, **options}


def token(number: int, batch: int = 2, length: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    sizes = {"q": (4, 4), "k": (2, 4), "v": (2, 3)}
    made = {name: torch.randn(batch, length, *size, generator=generator) for name, size in sizes.items()}
    return {**made, "mask": torch.ones(batch, length, dtype=torch.bool)}


@pytest.mark.parametrize("filtered", [True, False])
@pytest.mark.parametrize("options", [{}, {"sinks": 2}, {"window": 1, "places": 2}])
def test_every_step_is_the_recurrences_and_is_taken_by_the_step(filtered: bool, options: dict[str, int]) -> None:
    given = call(filtered, **options)
    for rank in range(20):
        arguments = {**given, **token(rank), "before": torch.full((2,), rank)}
        expected = truth(**arguments)
        with linearize.kernels.recording() as choices:
            found = evict_chunk(**arguments)
        assert [choice.kernel for choice in choices] == ["cpu.evict_step"]
        for a, b in zip(found, expected, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            torch.testing.assert_close(a, b, rtol=0, atol=1e-5)
        given |= {name: new for name, new in zip(STATE, found[1:], strict=True) if given[name] is not None}


def test_what_it_is_given_stays_as_it_is() -> None:
    given = {**call(False), **token(0), "before": torch.full((2,), 8)}
    before = {name: x.clone() for name, x in given.items() if isinstance(x, torch.Tensor)}
    evict_chunk(**given)
    assert all(torch.equal(given[name], x) for name, x in before.items())


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"before": torch.tensor([4, 7])}, "different places"),
        ({"mask": torch.tensor([[True], [False]])}, "padding"),
        (token(0, length=2), "T is 2"),
    ],
)
def test_what_is_no_such_step_goes_by_blocks(changes: dict[str, torch.Tensor], reason: str) -> None:
    given = {**call(False), **token(0), "before": torch.full((2,), 4), **changes}
    with linearize.kernels.recording() as choices:
        found = evict_chunk(**given)
    assert choices[0].kernel == "cpu.evict_stream"
    assert reason in choices[0].declined[0][1]
    real = given["mask"]
    torch.testing.assert_close(found[0][real], truth(**given)[0][real], rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"mass": None}, "give mass or filters"),
        ({"sinks": 6}, "too few to keep 6 sinks"),
        ({"window": 2}, "two blocks of 2"),
        ({"mass": torch.zeros(2, 2, 4)}, "mass must be"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(OperatorError, match=reason):
        evict_chunk(**{**call(False), **token(0), "before": torch.zeros(2, dtype=torch.int64), **changes})
