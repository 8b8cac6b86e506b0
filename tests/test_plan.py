"""Plans: JSON that a person edits, checked field by field and against the model's sites."""

import json
from pathlib import Path

import pytest

from linearize.errors import ArtifactError, RecipeError
from linearize.plan import Plan, PlanEntry
from tests import zoo

PLAN = Plan(
    recipe="mine",
    entries=(
        PlanEntry(site=0, module="layers.0.attn", mixer="lolcats", options={"window": 32}, reason="recipe"),
        PlanEntry(site=1, module="layers.1.attn", mixer="keep"),
    ),
)


def test_a_saved_plan_loads_as_it_was(tmp_path: Path) -> None:
    path = PLAN.save(tmp_path / "plan.json")
    assert Plan.load(path) == PLAN
    assert [file.name for file in tmp_path.iterdir()] == ["plan.json"]
    assert PLAN.entry(1).mixer == "keep"
    with pytest.raises(RecipeError, match=r"the plan has no entry for site 2; it has \[0, 1\]"):
        PLAN.entry(2)


def test_the_printed_plan_has_a_line_for_each_site() -> None:
    lines = str(PLAN).splitlines()
    assert lines[0] == "plan of recipe mine"
    assert lines[1].split() == ["0", "layers.0.attn", "lolcats{window=32}", "recipe"]
    assert lines[2].split() == ["1", "layers.1.attn", "keep"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda data: data["entries"][1].update(mixr="keep"), r"entries.1.mixr: Extra inputs are not permitted"),
        (lambda data: data["entries"][0].pop("module"), r"entries.0.module: Field required"),
        (lambda data: data["entries"][0].update(site=-1), r"entries.0.site: Input should be greater than or"),
        (lambda data: data["entries"][0].update(site="first"), r"entries.0.site: Input should be a valid integer"),
        (lambda data: data["entries"][0].update(options=[1]), r"entries.0.options: Input should be a valid dictionary"),
        (lambda data: data.update(entry=[]), r"entry: Extra inputs are not permitted"),
    ],
)
def test_a_wrong_edit_names_the_field(tmp_path: Path, edit: object, message: str) -> None:
    data = json.loads(PLAN.model_dump_json())
    edit(data)  # type: ignore[operator]
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(data))
    with pytest.raises(RecipeError, match=message):
        Plan.load(path)


def test_files_that_are_no_plan_are_told(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    with pytest.raises(RecipeError, match=r"cannot read the plan .*plan.json: No such file"):
        Plan.load(path)
    path.write_text('{"version": 1,\n "entries": [}')
    with pytest.raises(RecipeError, match=r"plan.json line 2: not JSON"):
        Plan.load(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"plan.json is not UTF-8"):
        Plan.load(path)
    path.write_text("[]")
    with pytest.raises(RecipeError, match=r"plan.json line 1: .*valid dictionary"):
        Plan.load(path)
    with pytest.raises(ArtifactError, match="cannot write"):
        PLAN.save(tmp_path / "absent" / "plan.json")


@pytest.mark.parametrize(
    ("sites", "message"),
    [
        ([0, 1, 2], r"names the sites \[2\] not; the model has \[0, 1, 2\]"),
        ([0], r"names the sites \[1\], which the model does not have matched"),
    ],
)
def test_a_plan_for_another_model_is_refused(sites: list[int], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        PLAN.check(sites)
    doubled = Plan(entries=(*PLAN.entries, PLAN.entries[0]))
    with pytest.raises(RecipeError, match=r"names the sites \[0\] twice"):
        doubled.check([0, 1])


def test_compile_refuses_plans_that_do_not_fit() -> None:
    entry = PlanEntry(site=0, module="m", mixer="lolcats", options={"window": 4})
    second = entry.model_copy(update={"site": 1})
    for entries, message in (
        ((entry,), r"\[1\] not"),
        ((entry, second, entry.model_copy(update={"site": 7})), r"\[7\], which the model does not have"),
        ((entry, second.model_copy(update={"mixer": "mamba"})), "no mixer named 'mamba'"),
        ((entry, second.model_copy(update={"options": {"wdow": 1}})), "mixer lolcats does not take the options"),
    ):
        with pytest.raises(RecipeError, match=message):
            zoo.compile_again("llama", plan=Plan(entries=entries), tokens=0)


def test_compile_refuses_a_mixer_that_the_site_cannot_take() -> None:
    """A plan written by hand is held to what the recipe would have been held to."""
    sites = zoo.captured("gemma2").matched
    entries = tuple(PlanEntry(site=site.index, module=site.module, mixer="lolcats") for site in sites)
    with pytest.raises(RecipeError, match=r"site 0 .*lolcats does not carry the soft-cap of 3"):
        zoo.compile_again("gemma2", plan=Plan(entries=entries), tokens=0)
