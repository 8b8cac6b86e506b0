"""The CPU benchmark: its cases are right before they are timed, and what is wrong is not timed."""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from linearize.kernels import register, registry
from linearize.kernels.cpu import GLA_STREAM

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "bench_kernels_cpu.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_kernels_cpu", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_every_case_is_right_and_gets_its_row(bench):
    torch.manual_seed(0)
    found = [*bench.cases(40), bench.step_case(40)]
    rows = bench.measure(found, bench.sdpa(40), rounds=1)
    assert [row.case for row in rows] == [case.name for case in found]
    assert all(row.error < bench.TOLERANCE and row.ms > 0 for row in rows)
    parts = ("machine", "ceilings", "merge over block", "memory over inputs")
    assert "| gla | 40 |" in bench.page({part: {} for part in parts}, rows)


def test_a_wrong_kernel_is_named_and_not_timed(bench, monkeypatch, capsys):
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))

    def run(*args, **keywords):
        o, s = GLA_STREAM.run(*args, **keywords)
        return o + 1e-3, s

    register(replace(GLA_STREAM, name="test.wrong", priority=99, run=run))
    rows = bench.measure([next(bench.cases(70))], bench.sdpa(70), rounds=1)
    assert rows == []
    assert "WRONG, not timed: gla at 70" in capsys.readouterr().out


def test_a_bar_that_is_missed_is_marked(bench):
    row = bench.Row("gla", 4096, "cpu.gla_stream", 1e-7, 2.0, 6.0, 3.0, 4.0)
    assert bench.cells(row)[-1] == "4 missed"
    assert bench.cells(replace(row, ratio=5.0))[-1] == "4"
