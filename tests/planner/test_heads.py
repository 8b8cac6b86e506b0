"""Heads that differ: the search against trying everything, and what a mixture is predicted to lose."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray

from linearize.planner.candidates import Candidate
from linearize.planner.choices import SHRUNK, Known, half_square, mixture_loss, shrunk
from linearize.planner.heads import mixtures

Array = NDArray[np.float64]


def layer(seed: int, heads: int = 3, candidates: int = 6, draws: int = 12) -> tuple[Array, Array]:
    """(vectors [G, C, K], costs [C]) of errors that heads have in common in part, smaller where they cost more."""
    generator = np.random.default_rng(seed)
    vectors = generator.normal(size=(heads, candidates, draws)) + generator.normal(size=(1, 1, draws))
    vectors *= (2.0 ** -np.arange(candidates) * generator.uniform(0.5, 2, (heads, candidates)))[..., None]
    return vectors, np.sort(generator.uniform(1, 100, candidates))


def loss(vectors: Array, row: tuple[int, ...]) -> float:
    return half_square(np.stack([vectors[head, at] for head, at in enumerate(row)]))


def test_the_search_finds_nearly_what_trying_everything_finds() -> None:
    ratios = []
    for seed in range(40):
        vectors, costs = layer(seed)
        every = [(costs[list(row)].sum(), loss(vectors, row)) for row in itertools.product(range(6), repeat=3)]
        found = [(costs[row].sum(), loss(vectors, tuple(row))) for row in mixtures(vectors, costs)]
        for budget in np.linspace(3.01 * costs[0], 3 * costs[-1], 20):
            best, own = (min(lost for cost, lost in those if cost <= budget) for those in (every, found))
            ratios.append(own / best)
    assert min(ratios) >= 1 - 1e-9
    assert np.quantile(ratios, 0.9) < 1.001
    assert max(ratios) < 2


def test_errors_that_cancel_are_put_together() -> None:
    """Two heads with opposite errors of the cheap candidate: both cheap is as good as both dear, one of each is not."""
    vectors = np.zeros((2, 2, 3))
    vectors[0, 0], vectors[1, 0] = [1, 0, 0], [-1, 0, 0]
    vectors[:, 1] = [[0, 0.1, 0], [0, 0, 0.1]]
    rows = mixtures(vectors, np.array([1.0, 5.0]))
    assert rows.tolist() == [[0, 0]]
    vectors[1, 0] = [1, 0, 0]
    assert mixtures(vectors, np.array([1.0, 5.0])).tolist() == [[0, 0], [1, 0], [1, 1]]


def test_the_same_vectors_give_the_same_rows_and_not_more_than_asked_for() -> None:
    vectors, costs = layer(0, heads=8, candidates=20, draws=30)
    rows = mixtures(vectors, costs, most=24)
    assert 2 <= len(rows) <= 24
    assert (rows == mixtures(vectors.copy(), costs.copy(), most=24)).all()
    assert (np.diff(costs[rows].sum(1)) > -1e-9).all()


def known(name: str, lost: float, sketch: list[list[float]]) -> Known:
    heads = 0.5 * np.square(np.array(sketch)).sum(1)
    return Known(Candidate(name), lost, shrunk(np.array(sketch), heads))


def test_a_mixture_loses_what_its_heads_lose_and_what_they_have_in_common() -> None:
    one, other = known("one", 2.0, [[1.0, 0.0], [1.0, 0.0]]), known("other", 0.5, [[0.0, 1.0], [0.6, 0.8]])
    table = {row.candidate: row for row in (one, other)}
    assert mixture_loss(table, (one.candidate, one.candidate)) == 2.0
    kept = known("keep", 0.0, [[0.0, 0.0], [0.0, 0.0]])
    table[kept.candidate] = kept
    assert mixture_loss(table, (one.candidate, kept.candidate)) == pytest.approx(0.5)  # one head alone: its own loss
    beyond = [np.log(2.0 / (1 + (1 - SHRUNK))), np.log(0.5 / (1 + (1 - SHRUNK) * 0.8))]
    expected = (1 + (1 - SHRUNK) * 0.6) * np.exp(np.mean(beyond))
    assert mixture_loss(table, (one.candidate, other.candidate)) == pytest.approx(expected)


def test_where_all_heads_lose_the_same_way_the_measured_loss_decides() -> None:
    """A drop that loses twice its second order: mixed with another of the same kind, that is kept."""
    one, other = (known(name, 4.0, [[1.0, 0.0], [1.0, 0.0]]) for name in ("one", "other"))
    table = {row.candidate: row for row in (one, other)}
    assert mixture_loss(table, (one.candidate, other.candidate)) == pytest.approx(4.0)
