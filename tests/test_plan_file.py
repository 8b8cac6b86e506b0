"""A plan in a file that a person edited: each problem is told with its line."""

import json
from pathlib import Path

import pytest

from linearize.errors import RecipeError
from linearize.plan import Fit, Plan, PlanEntry, PlanFigures
from linearize.plan_file import lines_of, read_plan
from tests import zoo

PARTS = [{"mixer": "keep", "kv_heads": [0]}, {"mixer": "slots", "kv_heads": [1], "options": {"slots": 8}}]
PLAN = Plan(
    recipe="plan",
    figures=PlanFigures(context=64, state_bytes=5, source_bytes=9, predicted_loss=0.25),
    fit=Fit(tokens=512, passes=0),
    entries=(
        PlanEntry(site=0, module="a", mixer="window", options={"window": 4}),
        PlanEntry(site=1, module="b", mixer="mixture", options={"parts": PARTS}),
    ),
)


def saved(tmp_path: Path, *changes: tuple[str, str]) -> tuple[Path, list[str]]:
    """The plan's file with each text replaced once, and its lines."""
    path = PLAN.save(tmp_path / "plan.json")
    text = path.read_text()
    for old, new in changes:
        assert old in text, text
        text = text.replace(old, new, 1)
    path.write_text(text)
    return path, text.splitlines()


def line_with(lines: list[str], text: str) -> int:
    return next(number for number, line in enumerate(lines, 1) if text in line)


def test_a_plan_with_figures_and_fit_loads_as_it_was(tmp_path: Path) -> None:
    path, _ = saved(tmp_path)
    assert Plan.load(path) == PLAN


def test_a_file_of_version_1_still_loads(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text('{"version": 1, "recipe": "lolcats", "entries": []}')
    assert Plan.load(path).fit is None


@pytest.mark.parametrize(
    ("old", "new", "at", "message"),
    [
        ('"mixer": "window"', '"mixer": "windw"', "windw", "entries.0.mixer: no mixer named 'windw'"),
        ('"window": 4', '"wndow": 4', "wndow", "entries.0.options.wndow: window has no option 'wndow'; it takes"),
        ('"mixer": "slots"', '"mixer": "slotz"', "slotz", "entries.1.options.parts.1.mixer: no mixer named 'slotz'"),
        ('"slots": 8', '"slts": 8', "slts", "parts.1.options.slts: slots has no option"),
        ('"module": "b"', '"modul": "b"', '"site": 1', "entries.1.module: Field required"),
        ('"site": 1', '"site": "one"', "one", "entries.1.site: Input should be a valid integer"),
        ('"version": 2', '"version": 9', "version", "version: 9 is not known here"),
        ('"passes": 0', '"passes": -1', "passes", "fit.passes: Input should be greater than or equal to 0"),
    ],
)
def test_a_wrong_edit_names_the_line(tmp_path: Path, old: str, new: str, at: str, message: str) -> None:
    path, lines = saved(tmp_path, (old, new))
    with pytest.raises(RecipeError) as caught:
        Plan.load(path)
    assert message in str(caught.value)
    # a field that is missing is told where the entry that lacks it begins
    expected = line_with(lines, at) - (1 if "required" in message else 0)
    assert f"plan.json line {expected}: " in str(caught.value)


def test_what_does_not_fit_the_model_names_the_line(tmp_path: Path) -> None:
    sites = zoo.captured("llama").matched
    for old, new, at, message in (
        ('"site": 1', '"site": 7', '"site": 7', "the model has no matched site 7; it has [0, 1]"),
        ('"site": 1', '"site": 0', '"module": "b"', "site 0 is planned in line"),
        ('"kv_heads"', '"kv_head"', '"parts"', "a part has mixer, kv_heads and perhaps options"),
    ):
        path, lines = saved(tmp_path, (old, new))
        with pytest.raises(RecipeError) as caught:
            read_plan(path).check(sites)
        assert message in str(caught.value)
        if "parts" not in at:
            line = line_with(lines, at) - (1 if "module" in at else 0)
            assert f"line {line}: " in str(caught.value)


def test_a_refused_mixer_names_the_line(tmp_path: Path) -> None:
    sites = zoo.captured("gemma2").matched
    entries = tuple(PlanEntry(site=site.index, module=site.module, mixer="lolcats") for site in sites)
    path = Plan(entries=entries).save(tmp_path / "plan.json")
    line = line_with(path.read_text().splitlines(), '"mixer"')
    with pytest.raises(RecipeError, match=rf"line {line}: entries.0.mixer: site 0 .*soft-cap.*plan keep there"):
        read_plan(path).check(sites)


def test_a_cache_that_cannot_be_read_names_the_line(tmp_path: Path) -> None:
    """Edited by hand: the site whose cache is read becomes a window, or there is none of that number."""
    sites = zoo.captured("llama").matched
    entries = [
        PlanEntry(site=0, module=sites[0].module, mixer="keep"),
        PlanEntry(site=1, module=sites[1].module, mixer="share", options={"of": 0}),
    ]
    path = Plan(entries=tuple(entries)).save(tmp_path / "plan.json")
    read_plan(path).check(sites)
    text = path.read_text()
    line = line_with(text.splitlines(), '"of"')
    path.write_text(text.replace('"keep"', '"window"'))
    with pytest.raises(RecipeError, match=rf"line {line}: entries.1.options.of: .* becomes window and has none"):
        read_plan(path).check(sites)


def test_compile_takes_the_file_and_fits_as_it_says(tmp_path: Path) -> None:
    sites = zoo.captured("llama").matched
    entries = tuple(
        PlanEntry(site=site.index, module=site.module, mixer="moments", options={"window": 4}) for site in sites
    )
    path = Plan(fit=Fit(tokens=64, length=16, batch=2, passes=0), entries=entries).save(tmp_path / "plan.json")
    compiled = zoo.compile_again("llama", plan=path)
    assert [entry.label() for entry in compiled.plan.entries] == ["moments{window=4}"] * len(sites)
    assert compiled.report.tokens_held_out > 0
    assert all(row.error_fitted is not None for row in compiled.report.sites)


def test_lines_are_those_of_any_valid_json() -> None:
    text = '{\n "a": [1,\n  {"b\\"c": null}, []\n ],\n "d": {},  "e": -1.5e3\n}'
    assert json.loads(text)
    found = lines_of(text)
    assert found == {
        (): 1, ("a",): 2, ("a", 0): 2, ("a", 1): 3, ("a", 1, 'b"c'): 3, ("a", 2): 3, ("d",): 5, ("e",): 5,
    }  # fmt: skip
