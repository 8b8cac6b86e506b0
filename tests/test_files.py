"""Writing all or nothing."""

import os
from pathlib import Path

import pytest

from linearize.errors import ArtifactError
from linearize.files import check_new_directory, new_directory, write_atomically


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    for content in (b"first", b"2"):
        assert write_atomically(path, content) == path
        assert path.read_bytes() == content
    assert os.listdir(tmp_path) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"cannot write .*absent/a.json: No such file"):
        write_atomically(tmp_path / "absent" / "a.json", b"x")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ArtifactError, match=r"cannot write .*folder: Is a directory"):
        write_atomically(tmp_path / "folder", b"x")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_directory_appears_complete(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    with new_directory(target) as temporary:
        (temporary / "one").write_text("1")
        assert not target.exists()
    assert os.listdir(target) == ["one"]
    assert os.listdir(target.parent) == ["out"]


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    with new_directory(target) as temporary:
        (temporary / "one").write_text("1")
    assert os.listdir(target) == ["one"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, OSError])
def test_a_failure_while_filling_leaves_nothing(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "out"

    def fill() -> None:
        with new_directory(target) as temporary:
            (temporary / "one").write_text("1")
            raise error("stopped")

    with pytest.raises((error, ArtifactError)):
        fill()
    assert os.listdir(tmp_path) == []


def test_outputs_that_are_in_the_way_are_named_before_the_work(tmp_path: Path) -> None:
    full = tmp_path / "full"
    full.mkdir()
    (full / "one").write_text("1")
    file = tmp_path / "file"
    file.write_text("1")
    for target, message in (
        (full, "full exists already; choose another output"),
        (file, "file exists already"),
        (file / "out", "cannot write .*: .*file is not a directory"),
    ):
        with pytest.raises(ArtifactError, match=message):
            check_new_directory(target)
        with pytest.raises(ArtifactError, match=message), new_directory(target):
            raise AssertionError("entered")
    assert (full / "one").read_text() == "1"
    check_new_directory(tmp_path / "a" / "b" / "c")
    assert not (tmp_path / "a").exists()


def test_a_folder_that_nobody_can_write_to_is_named() -> None:
    with pytest.raises(ArtifactError, match=r"cannot write /proc/out: .* in /proc"):
        check_new_directory("/proc/out")
