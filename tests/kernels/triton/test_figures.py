"""The ahead-of-time gate: every configuration compiles for sm_80 and sm_90, without spills, as recorded."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
TOOL = ROOT / "tools" / "kernel_figures.py"
FITS = {"registers": 100, "stack": 0, "shared": 1000, "wgmma": 4}


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("kernel_figures", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_every_configuration_compiles_within_the_limits_and_as_recorded():
    compiling = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(TOOL)]
    result = subprocess.run(command, capture_output=True, text=True, env={**compiling, "PYTHONSAFEPATH": "1"})
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize(
    ("name", "change", "problem"),
    [
        ("sm_90 a #0 x", {"stack": 8}, "spills, 8 bytes"),
        ("sm_90 a #0 x", {"shared": 232449}, "over 232448"),
        ("sm_80 a #1 x", {"shared": 166913}, "over 166912"),
        ("sm_80 a #0 x", {"shared": 101377}, "over 101376"),
        ("sm_90 a #0 x", {"registers": 101}, "if meant, run kernel_figures.py --bless"),
    ],
)
def test_the_gate_refuses(tool, name, change, problem):
    found = {name: FITS | change}
    recorded = {name: FITS} if "registers" in change else found
    (line,) = tool.problems(found, recorded)
    assert problem in line


def test_the_gate_accepts_what_fits_and_is_recorded(tool):
    found = {"sm_90 a #0 x": FITS | {"shared": 232448}, "sm_80 a #1 x": FITS | {"shared": 166912}}
    assert tool.problems(found, found) == []
    assert tool.problems(found, None) == []


def test_the_gate_notices_a_configuration_that_is_gone(tool):
    assert tool.problems({}, {"sm_90 a #0 x": FITS}) == ["sm_90 a #0 x: recorded, but no longer compiled"]


def test_figures_of_two_versions_of_triton_are_recorded():
    recorded = json.loads((Path(__file__).parent / "figures.json").read_text())
    assert set(recorded) == {"3.6.0", "3.9.0"}
    assert set(recorded["3.6.0"]) == set(recorded["3.9.0"])
    assert any(figure["wgmma"] for figure in recorded["3.9.0"].values())
