"""What every test shares: a clean sys.path, a guard against name clashes, golden files, hypothesis settings."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import settings
from torch.testing import FileCheck

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
CLASHING_NAMES = ("passes", "kernels", "export")

# `python -m pytest` puts the checkout's root on sys.path, where our `kernels` shadows the third-party package.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != ROOT]

# Between passes, exact ones are compared by their logits too.
os.environ["LINEARIZE_VERIFY"] = "numerics"

# Triton decides when it is first imported whether kernels are interpreted; only the GPU tests compile them.
if os.environ.get("LINEARIZE_GPU") != "1":
    os.environ["TRITON_INTERPRET"] = "1"

# The first call of an operator is far slower than the next ones, so a deadline would fail at random; CI repeats itself.
settings.register_profile("linearize", deadline=None, print_blob=True, derandomize="CI" in os.environ)
settings.load_profile("linearize")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--bless", action="store_true", help="rewrite the golden files from what the code does now")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Under --bless only the tests that own a golden file run."""
    if config.getoption("--bless"):
        items[:] = [item for item in items if "check_golden" in getattr(item, "fixturenames", ())]


def modules_of_ours_under_a_bare_name() -> list[str]:
    files = {name: getattr(sys.modules.get(name), "__file__", None) or "" for name in CLASHING_NAMES}
    return [name for name, file in files.items() if Path(file).is_relative_to(ROOT)]


@pytest.fixture(autouse=True)
def no_folder_of_ours_under_a_bare_name() -> Iterator[None]:
    """Fail the test that imports passes/, kernels/ or export/ under a name that is not theirs."""
    yield
    ours = modules_of_ours_under_a_bare_name()
    assert not ours, f"imported under a bare name: {ours}; write linearize.<name>"


@pytest.fixture
def check_golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`check_golden(name, text)` compares the text with tests/golden/<name>.txt; --bless rewrites that file."""

    def check(name: str, text: str) -> None:
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--bless"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(as_checks(text))
            return
        assert path.exists(), f"no golden file {path.relative_to(ROOT)}: run `make bless` and review it"
        FileCheck().run(path.read_text(), without_blank_lines(text))

    return check


def without_blank_lines(text: str) -> str:
    return "".join(f"{line}\n" for line in text.splitlines() if line.strip())


def as_checks(text: str) -> str:
    """The lines of a text as FileCheck directives, each of which must follow the one before it directly."""
    lines = [line.strip() for line in without_blank_lines(text).splitlines()]
    return "".join(f"# {'CHECK' if i == 0 else 'CHECK-NEXT'}: {line}\n" for i, line in enumerate(lines))
