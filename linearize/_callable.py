"""Packages that are also functions.

`linearize.capture` and `linearize.export` are public functions, and folders of the same names hold their code.
Importing a sub-package rebinds the name on its parent, so the package itself answers the call.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from typing import Any


def make_callable(package: str, function: Callable[..., Any]) -> None:
    """Make the imported `package` callable as `function`, signature and docstring included."""

    class CallablePackage(types.ModuleType):
        __signature__ = None

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

    CallablePackage.__call__.__doc__ = function.__doc__
    CallablePackage.__call__.__wrapped__ = function  # type: ignore[attr-defined]
    sys.modules[package].__class__ = CallablePackage
