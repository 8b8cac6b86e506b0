"""tools/check_exports.py: what is of today's code is not done again, and a row that fails is said and not kept."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from linearize.errors import ExportError
from linearize.mixers import mixer_names

PATH = Path(__file__).resolve().parents[2] / "tools" / "check_exports.py"
FOUND = {"logits": 0.0, "states": 0.0, "greedy": "200/200", "lowered to": []}


@pytest.fixture
def tool(monkeypatch):
    spec = importlib.util.spec_from_file_location("check_exports", PATH)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "check_exports", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.parity, "STEPS", module.parity.STEPS)  # main sets it
    return module


def run(tool, monkeypatch, table, *arguments):
    monkeypatch.setattr(sys, "argv", ["check_exports.py", "--json", str(table), *arguments])
    tool.main()
    return json.loads(table.read_text())


def test_only_rows_of_other_code_are_done_again(tool, monkeypatch, tmp_path):
    done = []
    monkeypatch.setattr(tool, "check", lambda case: done.append(case) or FOUND)
    table = tmp_path / "checks.json"
    rows = run(tool, monkeypatch, table, "--only", "mixer:gla", "mixer:window")
    assert [(case.recipe, case.flavour) for case in done] == [
        (f"mixer:{name}", flavour) for name in ("gla", "window") for flavour in ("native", "portable")
    ]
    rows[0]["code"] = "another"
    table.write_text(json.dumps(rows))
    done.clear()
    assert len(run(tool, monkeypatch, table, "--only", "mixer:gla", "mixer:window")) == 4
    assert done == [("qwen3", "mixer:gla", "native")]


def test_a_row_that_fails_is_named_and_leaves_the_table(tool, monkeypatch, tmp_path, capsys):
    table = tmp_path / "checks.json"
    row = {"model": "qwen3", "recipe": "mixer:gla", "flavour": "native", "code": "another", **FOUND}
    table.write_text(json.dumps([row]))

    def check(case):
        if case.flavour == "native":
            raise ExportError("they disagree")
        return FOUND

    monkeypatch.setattr(tool, "check", check)
    with pytest.raises(SystemExit, match="1 failed: qwen3 mixer:gla native"):
        run(tool, monkeypatch, table, "--only", "mixer:gla")
    assert "FAILED qwen3 mixer:gla native: they disagree" in capsys.readouterr().out
    assert [row["flavour"] for row in json.loads(table.read_text())] == ["portable"]


def test_every_mixer_has_a_row_and_its_own_code_decides_it(tool, monkeypatch):
    recipes = {case.recipe for case in tool.cases()}
    assert {f"mixer:{name}" for name in mixer_names()} <= recipes
    before = {name: tool.code_of(f"mixer:{name}") for name in ("gla", "slots", "mixture")}
    real = tool.meaning
    monkeypatch.setattr(tool, "meaning", lambda text: real(text + "\nx = 1" * ("class Gla(" in text)))
    assert {name: tool.code_of(f"mixer:{name}") != code for name, code in before.items()} == {
        "gla": True, "slots": False, "mixture": False,
    }  # fmt: skip
    monkeypatch.setattr(tool, "meaning", lambda text: real(text + "\nx = 1" * ("class Window(" in text)))
    assert tool.code_of("mixer:mixture") != before["mixture"]


def test_comments_and_docstrings_are_not_code(tool):
    plain = "def f(x):\n    return x\n"
    assert tool.meaning('"""Said."""\ndef f(x):\n    """Said."""\n    return x  # why\n') == tool.meaning(plain)
    assert tool.meaning("def f(x):\n    return x + 1\n") != tool.meaning(plain)
