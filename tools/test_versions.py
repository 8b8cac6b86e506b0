"""Run the tests with another pair of torch and transformers, in an environment of its own.

    python tools/test_versions.py                                    # the oldest: torch 2.11.0, transformers 5.17.0
    python tools/test_versions.py --torch 2.12.0 -- -k capture -n 2  # what follows -- goes to pytest

The environment is `.venv-torch-transformers` in the checkout, made once and kept. The index's plain torch may bring
gigabytes of CUDA; PIP_INDEX_URL may name an index with CPU builds. The rest is as constraints.txt has it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # not there under PYTHONSAFEPATH

from setup_environment import ROOT, canonical_name, constraints_keeping_torch

OLDEST = {"torch": "2.11.0", "transformers": "5.17.0"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--torch", default=OLDEST["torch"])
    parser.add_argument("--transformers", default=OLDEST["transformers"])
    parser.add_argument("pytest_args", nargs="*")
    arguments = parser.parse_args()
    environment = ROOT / f".venv-{arguments.torch}-{arguments.transformers}"
    python = environment / "bin" / "python"
    install(environment, python, arguments.torch, arguments.transformers)
    command = [str(python), "-m", "pytest", "-q", *(arguments.pytest_args or ["-n", "2", "--dist", "loadfile"])]
    settings = {"PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    sys.exit(subprocess.run(command, cwd=ROOT, env={**os.environ, **settings}).returncode)


def install(environment: Path, python: Path, torch: str, transformers: str) -> None:
    """The environment with these two versions; nothing is fetched where it has them already."""
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    pip = [str(python), "-m", "pip", "--quiet", "install"]
    subprocess.run([*pip, f"torch=={torch}"], check=True)
    script = "import importlib.metadata as m, json; print(json.dumps(m.distribution('torch').requires or []))"
    requires = subprocess.run([str(python), "-c", script], check=True, capture_output=True, text=True).stdout
    with tempfile.TemporaryDirectory() as folder:
        pins = Path(folder) / "constraints.txt"
        pins.write_text(constraints_of_pair((ROOT / "constraints.txt").read_text(), torch, transformers, requires))
        subprocess.run([*pip, "-e", f"{ROOT}[dev]", "-c", str(pins)], check=True)


def constraints_of_pair(constraints: str, torch: str, transformers: str, requires: str) -> str:
    """constraints.txt with this pair in it, free of what torch pins for itself (`requires`, a JSON list)."""
    free = constraints_keeping_torch(constraints, torch, json.loads(requires))
    lines = [line for line in free.splitlines() if canonical_name(line) != "transformers"]
    return "\n".join([*lines, f"transformers=={transformers}", ""])


if __name__ == "__main__":
    main()
