"""A fit that was cut off goes on where it stopped, and ends the same."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import linearize
from linearize.calibration import samples
from linearize.passes.calibrate import fit_outputs
from linearize.program import Program
from linearize.runtime.model import LinearizedModel
from tests import zoo

RECIPE = "lolcats{window=4,features=8}"


@functools.cache
def llama() -> Program:
    """Not the zoo's own: its weights are in the key of what is kept, so no other test may touch them."""
    return linearize.capture(zoo.BY_NAME["llama"].build())


def fitted(folder: Path | str | None, **options: object) -> LinearizedModel:
    given = {"tokens": 512, "progress": False, **options}
    return linearize.compile(llama(), RECIPE, checkpoints=folder, **given)  # type: ignore[arg-type]


def weights(model: LinearizedModel) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in model.source.module.state_dict().items() if "mixers" in name}


def assert_same(one: LinearizedModel, other: LinearizedModel) -> None:
    expected, actual = weights(one), weights(other)
    assert expected
    assert expected.keys() == actual.keys()
    assert all(torch.equal(tensor, actual[name]) for name, tensor in expected.items())
    assert [row.error_fitted for row in one.report.sites] == [row.error_fitted for row in other.report.sites]


class Cut(Exception):
    pass


def fit_only(count: int, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let `count` sites be fitted and cut the next one off; the list says which were fitted."""
    fit, done = fit_outputs.fit_mixer, []

    def cut(mixer, train, held, site, *rest):  # type: ignore[no-untyped-def]
        if len(done) == count:
            raise Cut
        fit(mixer, train, held, site, *rest)
        done.append(site.index)

    monkeypatch.setattr(fit_outputs, "fit_mixer", cut)
    return done


def test_a_fit_cut_off_between_sites_goes_on_and_ends_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fitted(None)
    with monkeypatch.context() as patch:
        fit_only(1, patch)
        with pytest.raises(Cut):
            fitted(tmp_path / "work")
    with monkeypatch.context() as patch:
        done = fit_only(9, patch)
        patch.setattr(samples, "_continue", None)  # the samples are not drawn again
        assert_same(fitted(tmp_path / "work"), whole)
    assert done == [1]


@pytest.mark.parametrize("options", [{"seed": 1}, {"tokens": 600}, {"calibration": [torch.arange(64).reshape(2, 32)]}])
def test_work_on_something_else_is_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, object]
) -> None:
    fitted(tmp_path)
    done = fit_only(9, monkeypatch)
    fitted(tmp_path, **options)
    assert done == [0, 1]


def test_a_damaged_file_is_fitted_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fitted(tmp_path)
    (file,) = tmp_path.glob("*/site-0.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    done = fit_only(9, monkeypatch)
    assert_same(fitted(tmp_path), whole)
    assert done == [0]


def test_nothing_is_made_where_nothing_is_fitted(tmp_path: Path) -> None:
    fitted(tmp_path / "work", tokens=0)
    assert not (tmp_path / "work").exists()


def killed_in_fit(folder: str, site: int) -> None:
    fit = fit_outputs.fit_mixer

    def kill(mixer, train, held, at, *rest):  # type: ignore[no-untyped-def]
        if at.index == site:
            os.kill(os.getpid(), signal.SIGKILL)
        fit(mixer, train, held, at, *rest)

    fit_outputs.fit_mixer = kill
    fitted(folder)


def test_a_killed_process_is_gone_on_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = str(Path(__file__).parents[2])
    call = f"from {__name__} import killed_in_fit; killed_in_fit({str(tmp_path)!r}, site=1)"
    code = f"import sys; sys.path.append({root!r}); {call}"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -signal.SIGKILL
    whole = fitted(None)
    done = fit_only(9, monkeypatch)
    assert_same(fitted(tmp_path), whole)
    assert done == [1]
