"""Install this checkout, editable and with the tested versions, into the environment whose Python runs this script.

`make setup` calls it; only the standard library and pip are needed. torch goes first and alone (constraints.txt says
why). An installed torch within the range of pyproject.toml, a CUDA build for example, stays with what it requires.
"""

import importlib.metadata
import json
import re
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PIP = [sys.executable, "-m", "pip"]


def canonical_name(requirement: str) -> str:
    """The normalised project name that a requirement starts with: `Torch_X>=1; ...` -> `torch-x`."""
    name = re.match(r"[A-Za-z0-9._-]+", requirement.strip())
    return re.sub(r"[-_.]+", "-", name.group()).lower() if name else ""


def torch_requirement(pyproject: str) -> str:
    """The range of torch that the project declares, such as `torch>=2.11,<2.14`."""
    dependencies = tomllib.loads(pyproject)["project"]["dependencies"]
    return next(item for item in dependencies if canonical_name(item) == "torch")


def is_satisfied(requirement: str) -> bool:
    """Whether the environment already meets the requirement, as pip itself sees it. Fetches and changes nothing."""
    dry_run = [*PIP, "install", "--quiet", "--dry-run", "--no-deps", "--no-index", "--report", "-", requirement]
    result = subprocess.run(dry_run, capture_output=True, text=True)
    return result.returncode == 0 and json.loads(result.stdout)["install"] == []


def constraints_keeping_torch(constraints: str, version: str, requires: list[str]) -> str:
    """Pin torch to the installed version, and leave what it requires to it: each release has limits of its own."""
    return without(constraints, {"torch", *map(canonical_name, requires)}) + f"torch=={version}\n"


def without(constraints: str, names: set[str]) -> str:
    """The constraints on all but `names`; a CUDA build of torch, for one, asks for a triton that may not be ours."""
    return "".join(f"{line}\n" for line in constraints.splitlines() if canonical_name(line) not in names)


def install(extras: str) -> None:
    constraints = (ROOT / "constraints.txt").read_text()
    torch = torch_requirement((ROOT / "pyproject.toml").read_text())
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "constraints.txt"
        if is_satisfied(torch):
            print(f"setup: keeping the installed torch {importlib.metadata.version('torch')}", flush=True)
        else:
            pins.write_text(without(constraints, {"triton"}))
            subprocess.run([*PIP, "install", torch, "-c", pins], check=True)
        installed = importlib.metadata.distribution("torch")
        pins.write_text(constraints_keeping_torch(constraints, installed.version, installed.requires or []))
        project = f"{ROOT}[{extras}]" if extras else str(ROOT)
        subprocess.run([*PIP, "install", "-e", project, "-c", pins], check=True)


if __name__ == "__main__":
    try:
        install(extras=sys.argv[1] if len(sys.argv) > 1 else "")
    except subprocess.CalledProcessError as error:
        sys.exit(f"setup: pip failed with exit code {error.returncode}; its messages above say why")
