"""`linearize bench`: a table of ratios, a plot, figures as JSON, and refusals."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
import torch

from linearize.errors import DataError
from linearize.runtime.bench import measure
from linearize.runtime.live_memory import peak_bytes
from tests import zoo

RECIPE = "lolcats{window=5}"


def test_table_plot_and_figures_agree(run: Any, compiled_dir: Path, llama_dir: Path, tmp_path: Path) -> None:
    result = run(
        "bench", compiled_dir, "--against", llama_dir, "--contexts", "64,600", "--batches", "1,2", "--steps", "1",
        "--plot", tmp_path / "plot.svg", "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    rows = json.loads((tmp_path / "figures.json").read_text())
    assert [(row["context"], row["batch"]) for row in rows] == [(64, 1), (64, 2), (600, 1), (600, 2)]
    for row in rows:
        assert row["speedup"] == row["tokens_per_second"][1] / row["tokens_per_second"][0]
        per_token = 2 * 2 * 2 * 8 * 4  # layers, keys and values, kv heads, dims, bytes
        assert row["carried"][0] == row["batch"] * row["context"] * per_token
        assert row["peak"][0] > row["carried"][0]
        assert (row["first_token"] is None) == (row["batch"] == 2)
        assert f"{row['speedup']:.2f}" in result.stdout
    assert rows[0]["carried"][1] == rows[2]["carried"][1]
    drawn = ElementTree.parse(tmp_path / "plot.svg").getroot()
    assert len([tag for tag in drawn.iter() if tag.tag.endswith("circle")]) == 2 * 8


@pytest.mark.parametrize("text", ["", "12,x", "0", "-3,4"])
def test_lists_that_are_no_numbers_are_refused(text: str) -> None:
    from linearize.cli.bench import numbers

    with pytest.raises(DataError, match="is no list of numbers above 0, such as 512,4096"):
        numbers(text, "--contexts")


def test_what_cannot_be_compared_is_refused() -> None:
    compiled = zoo.compiled("llama", RECIPE)
    with pytest.raises(DataError, match="no transformers model, so it has no key-value cache"):
        next(measure(zoo.source("nano_gpt"), compiled, [8], [1]))
    with pytest.raises(DataError, match="64 learned positions; bench contexts below that"):
        next(measure(zoo.source("gpt2"), zoo.compiled("gpt2", RECIPE), [64], [1]))


def test_peak_bytes_counts_what_is_alive_at_once() -> None:
    def two_alive() -> torch.Tensor:
        first = torch.zeros(1000)
        second = first + 1
        del first
        third = second * 2
        view = third[:10]
        return view

    assert peak_bytes(two_alive, torch.device("cpu")) == 2 * 4000


def test_peak_bytes_does_not_count_views_of_what_was_there() -> None:
    weight = torch.ones(100, 100)
    assert peak_bytes(lambda: torch.ones(1, 100) @ weight.t(), torch.device("cpu")) == 2 * 400
