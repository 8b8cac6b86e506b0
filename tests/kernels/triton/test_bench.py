"""The GPU benchmark, on small shapes in the interpreter: its cases are right, and what is wrong is not timed."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

from linearize.kernels import registry
from tests.kernels.triton.shim import honest

FILE = Path(__file__).resolve().parents[3] / "benchmarks" / "bench_kernels_gpu.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_kernels_gpu", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture
def _gpu_kernels_on_cpu(monkeypatch):
    """The operators run what they would on a GPU, in the interpreter."""
    found = dict(registry._KERNELS)
    swapped = {(op, "cpu"): kernels for (op, device), kernels in found.items() if device == "cuda"}
    monkeypatch.setattr(registry, "_KERNELS", found | swapped)


@pytest.mark.usefixtures("_gpu_kernels_on_cpu")
def test_every_kind_of_case_is_right_before_it_is_timed(bench):
    torch.manual_seed(0)
    makers = [
        bench.gla_cases("cpu", (20,), 20, heads=1),
        bench.hybrid_cases("cpu", (10,), heads=2, kv_heads=1),
        bench.step_cases("cpu", (1,), heads=2, kv_heads=1),
        bench.mla_cases("cpu", 20, (1,), heads=2),
        bench.slots_cases("cpu", 1, heads=1, kv_heads=1),
    ]
    cases = [case for made in makers for case in made]
    for case in cases:
        case.peers = {}
        case.bars = {name: bar for name, bar in case.bars.items() if name == "copy"}
    with torch.no_grad(), honest():
        rows = [bench.measure(case, lambda call: 1.0, 1000.0) for case in cases]
    assert len(rows) == 9
    assert [row.wrong for row in rows] == [""] * 9
    assert all(row.error > 0 for row in rows)
    assert sum(row.bandwidth > 0 for row in rows) == 5
    with (console := Console(width=160)).capture() as text:
        console.print(bench.shown(rows))
    assert "hybrid_step w=64 F=128 B=1" in text.get()


def test_a_wrong_kernel_is_not_timed(bench):
    wrong = bench.Case("wrong", lambda: torch.ones(3), lambda: torch.zeros(3).double())
    row = bench.measure(wrong, lambda call: pytest.fail("timed"), 1.0)
    assert row.wrong.startswith("differs from float64 by 1.0e+00")


def test_a_ratio_below_its_bar_is_named(bench):
    slow = bench.Case("slow", lambda: 2.0, None, {"sdpa": lambda: 3.0}, {"sdpa": 2.0, "copy": 0.5}, bytes=10**6)
    row = bench.measure(slow, lambda call: call(), 1.0)
    assert row.ratios == {"sdpa": 1.5}
    assert row.missed == ["sdpa 1.50 of 2.0"]


def test_ceilings_count_what_is_read_and_written(bench):
    found = bench.ceilings("cpu", lambda call: 1.0, 32)
    assert found == {"copy GB/s": 2 * 32 * 32 * 16 / 1e6, "matmul TFLOP/s": 2 * 32**3 / 1e9}
