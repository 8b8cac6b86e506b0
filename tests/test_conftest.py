"""The helpers of conftest.py notice what they are there to notice."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from torch.testing import FileCheck

from tests.conftest import ROOT, as_checks, modules_of_ours_under_a_bare_name, without_blank_lines

TEXT = "graph:\n    a = mul(x, 2)\n\n    b = add(a, 1)\nreturn b\n"


def test_a_text_passes_its_own_checks() -> None:
    FileCheck().run(as_checks(TEXT), without_blank_lines(TEXT))


@pytest.mark.parametrize(
    "changed",
    [TEXT.replace("mul", "div"), TEXT.replace("    b = add(a, 1)\n", ""), TEXT.replace("return b", "c = b\nreturn b")],
    ids=["another line", "a line less", "a line more"],
)
def test_a_changed_text_fails_the_checks(changed: str) -> None:
    with pytest.raises(RuntimeError):
        FileCheck().run(as_checks(TEXT), without_blank_lines(changed))


def test_a_golden_file_that_is_missing_is_an_error(
    check_golden: Callable[[str, str], None], pytestconfig: pytest.Config
) -> None:
    if pytestconfig.getoption("--bless"):
        pytest.skip("under --bless it would be written")
    with pytest.raises(AssertionError, match="make bless"):
        check_golden("no_such_file", TEXT)


def test_the_root_of_the_checkout_is_off_the_path() -> None:
    assert ROOT not in [Path(entry or ".").resolve() for entry in sys.path]


def test_a_folder_of_ours_under_a_bare_name_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    import linearize.passes

    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "passes", linearize.passes)
        assert modules_of_ours_under_a_bare_name() == ["passes"]
    assert modules_of_ours_under_a_bare_name() == []
