"""What is on disk is what gets installed: packages, data files, versions, entry point."""

import importlib.metadata
import importlib.util
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
FOLDERS = SETUPTOOLS["package-dir"]


def packages_on_disk(root: Path, folders: dict[str, str]) -> set[str]:
    """The dotted name, as installed, of every folder with an __init__.py."""
    return {
        ".".join([package, *init.parent.relative_to(root / folder).parts])
        for package, folder in folders.items()
        for init in (root / folder).rglob("__init__.py")
    }


def unlisted_data(root: Path, folders: dict[str, str], globs: dict[str, list[str]]) -> set[str]:
    """The files within the packages that are neither Python nor covered by a glob of package-data."""
    globbed = [(root / folders[package], glob) for package, patterns in globs.items() for glob in patterns]
    listed = {path for folder, glob in globbed for path in folder.glob(glob)}
    files = {path for folder in folders.values() for path in (root / folder).rglob("*") if path.is_file()}
    code = {path for path in files if path.suffix in {".py", ".pyc"}}
    return {str(path.relative_to(root)) for path in files - code - listed}


def pinned_versions() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def declared_names(project: dict[str, Any]) -> set[str]:
    requirements = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    return {re.split(r"[<>=!~; \[]", requirement)[0] for requirement in requirements}


def test_the_listed_packages_are_the_folders_with_an_init() -> None:
    assert sorted(SETUPTOOLS["packages"]) == sorted(packages_on_disk(ROOT, FOLDERS))


def test_every_data_file_is_installed() -> None:
    assert unlisted_data(ROOT, FOLDERS, SETUPTOOLS["package-data"]) == set()


def test_a_new_folder_and_a_new_data_file_are_noticed(tmp_path: Path) -> None:
    (tmp_path / "passes" / "novel").mkdir(parents=True)
    (tmp_path / "passes" / "novel" / "__init__.py").touch()
    (tmp_path / "passes" / "novel" / "table.csv").touch()
    folders = {"linearize.passes": "passes"}
    assert packages_on_disk(tmp_path, folders) == {"linearize.passes.novel"}
    assert unlisted_data(tmp_path, folders, {}) == {"passes/novel/table.csv"}


def test_everything_declared_is_pinned() -> None:
    assert declared_names(PYPROJECT["project"]) <= set(pinned_versions())


def test_no_pin_names_a_local_build() -> None:
    assert [name for name, version in pinned_versions().items() if not re.fullmatch(r"[0-9][0-9a-z.]*", version)] == []


def test_the_entry_point_is_a_function_of_the_package() -> None:
    (entry,) = importlib.metadata.entry_points(group="console_scripts", name="linearize")
    assert entry.value == PYPROJECT["project"]["scripts"]["linearize"]
    assert callable(entry.load())


def test_the_licence_is_apache_2() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert importlib.metadata.metadata("linearize")["License-Expression"] == "Apache-2.0"


# ---- tools/setup_environment.py --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def setup_environment() -> Any:
    spec = importlib.util.spec_from_file_location("setup_environment", ROOT / "tools" / "setup_environment.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_setup_reads_the_range_of_torch_from_pyproject(setup_environment: Any) -> None:
    requirement = setup_environment.torch_requirement((ROOT / "pyproject.toml").read_text())
    assert requirement.startswith("torch>=")


def test_setup_keeps_an_installed_torch_and_what_it_requires(setup_environment: Any) -> None:
    pins = "# torch first\ntorch==2.13.0\nsetuptools==84.2.1\ntyping-extensions==4.16.0\nrich==15.0.0\n"
    requires = ["setuptools<82", "Typing_Extensions>=4.10", 'triton==3.6.0; platform_system == "Linux"']
    kept = setup_environment.constraints_keeping_torch(pins, "2.11.0+cu128", requires)
    assert kept.splitlines() == ["# torch first", "rich==15.0.0", "torch==2.11.0+cu128"]


def test_setup_fetches_torch_without_a_pin_of_triton(setup_environment: Any) -> None:
    pins = setup_environment.without((ROOT / "constraints.txt").read_text(), {"triton"})
    assert "\ntorch==" in pins
    assert "triton==" not in pins


def test_setup_sees_what_is_installed(setup_environment: Any) -> None:
    assert setup_environment.is_satisfied("torch>=2.11,<2.14")
    assert not setup_environment.is_satisfied("torch<1")
