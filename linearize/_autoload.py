"""`AutoModelForCausalLM.from_pretrained` knows compiled models after `import linearize`, which imports no transformers.

transformers has no entry points for models of others, so we wait for its Auto modules to be imported and register then;
at once, if they have been.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from types import ModuleType

AUTO = "transformers.models.auto"
REGISTER = {f"{AUTO}.configuration_auto": "register_config", f"{AUTO}.modeling_auto": "register_model"}


class AutoClassFinder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: it has the usual finders look, and adds a step behind the module's execution."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in REGISTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _ThenRegister(spec.loader, fullname)
        return spec


class _ThenRegister(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, name: str) -> None:
        self.loader, self.name = loader, name

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        module.__loader__ = module.__spec__.loader = self.loader  # type: ignore[union-attr]
        register(self.name)


def register(name: str) -> None:
    function = getattr(importlib.import_module("linearize.huggingface.registering"), REGISTER[name])
    function()


def install() -> None:
    """Once a process."""
    for name in REGISTER:
        if name in sys.modules:
            register(name)
    if not any(isinstance(finder, AutoClassFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, AutoClassFinder())
