"""linearize: a compiler from softmax attention to a fixed-size state, for any decoder-only language model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from linearize._autoload import install

__version__ = "0.1.0"

__all__ = [
    "LinearizedModel",
    "Mixer",
    "Plan",
    "Recipe",
    "StateTensor",
    "capture",
    "compile",
    "compile_directory",
    "demo_model_dir",
    "export",
    "export_directory",
    "inspect",
    "load",
    "recipes",
    "register_mixer",
]

if TYPE_CHECKING:
    from linearize.api import compile, demo_model_dir, inspect, load
    from linearize.capture.torch_export import capture
    from linearize.export.write import export
    from linearize.exporting import export_directory
    from linearize.mixers.base import Mixer, register_mixer
    from linearize.on_disk import compile_directory
    from linearize.plan import Plan
    from linearize.program import StateTensor
    from linearize.recipe import Recipe, recipes
    from linearize.runtime.model import LinearizedModel

_HOMES = {
    "LinearizedModel": "linearize.runtime.model",
    "Mixer": "linearize.mixers.base",
    "Plan": "linearize.plan",
    "Recipe": "linearize.recipe",
    "compile": "linearize.api",
    "compile_directory": "linearize.on_disk",
    "demo_model_dir": "linearize.api",
    "export_directory": "linearize.exporting",
    "inspect": "linearize.api",
    "load": "linearize.api",
    "recipes": "linearize.recipe",
    "register_mixer": "linearize.mixers.base",
    "StateTensor": "linearize.program",
    # packages of the same name answer the call themselves, see _callable.py
    "capture": "linearize.capture",
    "export": "linearize.export",
}


def __getattr__(name: str) -> Any:
    """Load a public name on first use, so that `import linearize` costs little more than `import torch`."""
    import importlib

    if name not in _HOMES:
        raise AttributeError(f"module 'linearize' has no attribute {name!r}")
    module = importlib.import_module(_HOMES[name])
    value = module if _HOMES[name] == f"linearize.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])


install()
