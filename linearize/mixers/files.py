"""Mixers in a user's own Python file. The file is executed, so only a file that the user names is ever read."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from linearize.errors import RecipeError
from linearize.mixers.base import mixer_names


def load_mixers(path: str | Path) -> list[str]:
    """Execute a Python file that decorates its mixers with `register_mixer`; the names that are new.

    Raises:
        RecipeError: the file is not there, fails when run, or registers no mixer.
    """
    file = Path(path).expanduser()
    spec = importlib.util.spec_from_file_location(f"linearize_user_mixers_{file.stem}", file)
    if not file.is_file() or spec is None or spec.loader is None:
        raise RecipeError(f"cannot read the mixers in {path}: give a Python file (.py)")
    before = set(mixer_names())
    try:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    except RecipeError:
        raise
    except Exception as error:
        raise RecipeError(f"the mixers in {path} could not be loaded: {type(error).__name__}: {error}") from error
    return sorted(set(mixer_names()) - before)
