"""A mixer in a user's own file: one decorator, and it is planned, compiled, saved, loaded and exported."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import linearize
from linearize.errors import ArtifactError, RecipeError
from linearize.mixers import base
from linearize.mixers.files import load_mixers
from tests.export.models import Plain

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_mixer_stays() -> Iterator[None]:
    before = dict(base._REGISTRY)
    yield
    base._REGISTRY.clear()
    base._REGISTRY.update(before)


@pytest.fixture
def mixers_file(tmp_path: Path) -> Path:
    """The mixer of docs/writing-a-mixer.md, in a file outside the package."""
    page = (ROOT / "docs" / "writing-a-mixer.md").read_text()
    block = re.search(r"```python\n(.*?)```", page, re.DOTALL)
    assert block is not None
    assert block[1].count("\n") < 40
    path = tmp_path / "average.py"
    path.write_text(block[1])
    base._REGISTRY.pop("average", None)
    return path


def plain() -> torch.nn.Module:
    torch.manual_seed(0)
    return Plain().eval()


def test_it_is_a_recipe_that_compiles_saves_loads_and_exports(mixers_file: Path, tmp_path: Path) -> None:
    assert load_mixers(mixers_file) == ["average"]
    assert linearize.inspect(plain(), "average{keep=0.5}")["sites"][0]["plan"] == "average{keep=0.5}"
    compiled = linearize.compile(plain(), "average{keep=0.5}", tokens=0, progress=False)
    with torch.no_grad():
        for parameter in compiled.source.module.linearize_mixers.parameters():  # type: ignore[union-attr]
            parameter.fill_(1.0)
    compiled.save_pretrained(tmp_path / "saved")
    ids = torch.randint(61, (2, 9))
    assert torch.equal(linearize.load(tmp_path / "saved")(ids).logits, compiled(ids).logits)
    linearize.export(compiled, tmp_path / "onnx")


def test_loading_without_it_names_the_mixer_and_says_how_to_register_it(mixers_file: Path, tmp_path: Path) -> None:
    load_mixers(mixers_file)
    linearize.compile(plain(), "average", tokens=0, progress=False).save_pretrained(tmp_path / "saved")
    base._REGISTRY.pop("average")
    with pytest.raises(ArtifactError, match=r"site 0 .* is a 'average', .*register_mixer.*--mixers FILE.py"):
        linearize.load(tmp_path / "saved")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the mixers in .*: give a Python file"),
        ("import nowhere_at_all", "ModuleNotFoundError: No module named 'nowhere_at_all'"),
        ("x = ", "SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_loaded_is_told(tmp_path: Path, text: str | None, message: str) -> None:
    path = tmp_path / "mine.py"
    if text is not None:
        path.write_text(text)
    with pytest.raises(RecipeError, match=message):
        load_mixers(path)


def test_a_name_that_is_taken_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import linearize\n@linearize.register_mixer\nclass Mine(linearize.Mixer):\n    name = 'window'\n")
    with pytest.raises(RecipeError, match="a mixer named 'window' exists already: Window"):
        load_mixers(path)


def test_the_command_line_executes_only_a_file_that_it_is_given(
    mixers_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from typer.testing import CliRunner

    from linearize.cli import app

    monkeypatch.delenv("LINEARIZE_MIXERS", raising=False)
    monkeypatch.chdir(mixers_file.parent)
    assert CliRunner().invoke(app, ["recipes", "average"]).exit_code == 1
    assert CliRunner().invoke(app, ["recipes", "average", "--mixers", str(mixers_file)]).exit_code == 0
    base._REGISTRY.pop("average")
    monkeypatch.setenv("LINEARIZE_MIXERS", str(mixers_file))
    assert CliRunner().invoke(app, ["recipes", "average"]).exit_code == 0
