"""The import direction of the design, enforced over the AST, and what `import linearize` may bring with it.

An area is a module of linearize/ or a package. It may import itself, the areas that the table allows it, and
third-party packages except those that are confined to one place.
"""

import ast
import subprocess
import sys
from fnmatch import fnmatchcase
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER_OF_PACKAGE = {
    "linearize.passes": "passes",
    "linearize.kernels": "kernels",
    "linearize.export": "export",
    "linearize": "linearize",
}

# ---- the rules -------------------------------------------------------------------------------------------------------

VOCABULARY = {"spec", "errors", "files", "progress", "svg", "_callable", "_autoload", "tensorfile", "weights"}
OPERATORS = VOCABULARY | {"ops"}
GRAPHS = OPERATORS | {"rewriting", "program"}
MIXERS = GRAPHS | {"mixers"}
MACHINERY = MIXERS | {"pipeline", "verify", "plan", "plan_file", "report", "recipe", "printing", "distill"}
LOWERING = {"kernels", "passes.lower"}
PASSES = MACHINERY | LOWERING | {"passes"}
SERVICES = PASSES | {"capture", "calibration", "runtime", "export"}

# area: the areas that it may import. Longest prefix wins, so `passes.lower` is not `passes`.
ALLOWED = {
    "spec": VOCABULARY,
    "errors": VOCABULARY,
    "files": VOCABULARY,
    "progress": VOCABULARY,
    "svg": VOCABULARY,
    "tensorfile": VOCABULARY,
    "weights": VOCABULARY,
    "_callable": VOCABULARY,
    "_autoload": VOCABULARY,
    "ops": OPERATORS,
    "rewriting": GRAPHS,
    "program": GRAPHS,
    "mixers": MIXERS,
    "pipeline": MACHINERY,
    "verify": MACHINERY,
    "plan": MACHINERY,
    "plan_file": MACHINERY,
    "report": MACHINERY,
    "distill": VOCABULARY,
    "recipe": MACHINERY,
    "printing": MACHINERY,
    "kernels": OPERATORS | {"kernels"},
    "passes.lower": MACHINERY | LOWERING,
    "passes.calibrate": SERVICES,  # fitting runs the teacher, so it stands above calibration and runtime
    "passes": PASSES,
    "capture": PASSES | {"capture"},  # it ends with the passes that normalise and match
    "export": OPERATORS | {"program", "runtime", "passes.lower", "export"},
    "calibration": SERVICES,
    "runtime": SERVICES,
    "huggingface": SERVICES | {"api", "huggingface"},
    "page": MACHINERY | {"svg", "page"},
    "serving": SERVICES | {"serving"},
    "planner": SERVICES | {"planner"},
    "api": SERVICES | {"api", "passes.calibrate"},
    "on_disk": SERVICES | {"api", "passes.calibrate"},
    "exporting": SERVICES | {"api"},
    "cli": SERVICES | {"api", "on_disk", "exporting", "cli", "root", "passes.calibrate", "serving", "page", "planner"},
    "root": VOCABULARY,
}

# Own modules that an area may import lazily on top of that: within a function, or for the type checker only.
LAZY = {
    "_autoload": {"huggingface"},
    "runtime": {"huggingface"},
    "root": SERVICES | {"api", "cli", "on_disk", "exporting"},
}

# third-party package: the modules that may import it, wherever in the file the import stands.
CONFINED = {
    "starlette": ["linearize.serving", "linearize.serving.*"],
    "uvicorn": ["linearize.cli.serve"],
    "lm_eval": ["linearize.calibration.evaluate_tasks"],
    "datasets": ["linearize.calibration.saved_datasets"],
    "triton": ["linearize.kernels.triton", "linearize.kernels.triton.*"],
    "fla": ["linearize.kernels.fla"],
    "transformers": ["linearize.capture.hf", "linearize.huggingface", "linearize.huggingface.*"],
    "executorch": ["linearize.export.pte"],
    "onnx": ["linearize.export", "linearize.export.*"],
    "onnx_ir": ["linearize.export", "linearize.export.*"],
    "onnxruntime": ["linearize.export", "linearize.export.*"],
    "onnxscript": ["linearize.export", "linearize.export.*"],
}

# Folders of ours that only the install names: on sys.path by accident, never by intent.
BARE_NAMES = {"passes", "kernels", "export"}

NOT_BROUGHT_BY_IMPORT = {"lm_eval", "triton", "fla", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "transformers"}

# ---- the checker -----------------------------------------------------------------------------------------------------


class Import(NamedTuple):
    target: str
    line: int
    lazy: bool


def imports_of(module: str, source: str, is_package: bool = False) -> list[Import]:
    """Every import of a source text, absolute and with its line: statements, and import_module("literal")."""
    package = module if is_package else module.rpartition(".")[0]
    found: list[Import] = []

    def visit(node: ast.AST, lazy: bool) -> None:
        found.extend(Import(target, node.lineno, lazy) for target in targets_of(node, package))  # type: ignore[attr-defined]
        runs_later = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for_checker = {id(child) for child in node.body} if is_type_checking(node) else set()  # type: ignore[attr-defined]
        for child in ast.iter_child_nodes(node):
            visit(child, lazy or runs_later or id(child) in for_checker)

    visit(ast.parse(source), lazy=False)
    return found


def targets_of(node: ast.AST, package: str) -> list[str]:
    """The dotted names that a node imports; `from a import b` gives a.b, since b may be a module."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        parts = package.split(".")
        base = ".".join(parts[: len(parts) - node.level + 1]) if node.level else ""
        base = ".".join(part for part in (base, node.module) if part)
        return [f"{base}.{alias.name}" for alias in node.names]
    if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
        called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        return [str(node.args[0].value)] if called in {"import_module", "__import__"} else []
    return []


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in {"TYPE_CHECKING", "typing.TYPE_CHECKING"}


def area_of(module: str) -> str | None:
    """The area of a module of ours, None if no line of the table covers it."""
    inner = module.removeprefix("linearize").removeprefix(".")
    parts = inner.split(".") if inner else []
    prefixes = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    return next((prefix for prefix in prefixes if prefix in ALLOWED), None if parts else "root")


def area_of_target(target: str) -> str:
    """The area of what an import names; a name that the root offers (`from linearize import compile`) is the root's."""
    return area_of(target) or "root"


def violations(module: str, source: str, is_package: bool = False) -> list[str]:
    """The imports of a module that break a rule, each as one readable line."""
    area = area_of(module)
    if area is None:
        return [f"{module}: no area covers this module; give it a line in ALLOWED"]
    return [
        f"{module}:{found.line}: {problem}"
        for found in imports_of(module, source, is_package)
        if (problem := problem_of(module, area, found))
    ]


def problem_of(module: str, area: str, found: Import) -> str | None:
    top = found.target.partition(".")[0]
    if top in BARE_NAMES:
        return f"imports `{top}`, which is linearize.{top}"
    if top in CONFINED and not any(fnmatchcase(module, place) for place in CONFINED[top]):
        return f"imports {top}, which only {' and '.join(CONFINED[top])} may"
    if top != "linearize":
        return None
    target = area_of_target(found.target)
    allowed = ALLOWED[area] | {area} | (LAZY.get(area, set()) if found.lazy else set())
    return None if target in allowed else f"{area} imports {target} ({found.target}), against the direction"


def modules_on_disk() -> list[tuple[str, Path]]:
    """Every Python file of the four packages with the name that it is installed under."""
    return [
        (".".join([package, *path.relative_to(ROOT / folder).with_suffix("").parts]).removesuffix(".__init__"), path)
        for package, folder in FOLDER_OF_PACKAGE.items()
        for path in sorted((ROOT / folder).rglob("*.py"))
    ]


# ---- the tree --------------------------------------------------------------------------------------------------------


def test_imports_follow_the_direction_of_the_design() -> None:
    modules = modules_on_disk()
    assert modules, "no modules found: has the tree moved?"
    found = [line for name, path in modules for line in violations(name, path.read_text(), path.name == "__init__.py")]
    assert not found, "\n" + "\n".join(found)


def test_every_area_of_the_table_is_allowed_only_known_areas() -> None:
    named = set().union(*ALLOWED.values(), *LAZY.values(), LAZY)
    assert named <= set(ALLOWED)


@pytest.mark.parametrize("folder", ["tests", "tools", "benchmarks"])
def test_no_helper_imports_a_folder_under_its_bare_name(folder: str) -> None:
    found = [
        f"{path.relative_to(ROOT)}:{found.line}: imports {found.target}"
        for path in sorted((ROOT / folder).rglob("*.py"))
        for found in imports_of(path.stem, path.read_text())
        if found.target.partition(".")[0] in BARE_NAMES
    ]
    assert not found, "\n" + "\n".join(found)


def run_python(code: str, *arguments: str) -> str:
    """What a fresh interpreter, away from the checkout's root, prints."""
    command = [sys.executable, "-P", "-c", code, *arguments]
    result = subprocess.run(command, capture_output=True, text=True, cwd=Path(sys.prefix), timeout=300)
    assert result.returncode == 0, result.stderr
    return result.stdout


MODULES_ADDED_OVER_TORCH = """
import importlib, sys
import torch
before = set(sys.modules)
for name in sys.argv[1:]:
    importlib.import_module(name)
print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
"""


def test_import_linearize_brings_no_heavy_package() -> None:
    added = set(run_python(MODULES_ADDED_OVER_TORCH, "linearize").split())
    assert "linearize" in added
    assert not added & NOT_BROUGHT_BY_IMPORT


def test_the_probe_for_heavy_packages_sees_one() -> None:
    assert "onnx" in run_python(MODULES_ADDED_OVER_TORCH, "onnx").split()


def test_the_installed_packages_are_the_folders_of_this_checkout() -> None:
    code = "import sys, linearize.passes, linearize.kernels, linearize.export as e; print(e.__file__, *sys.modules)"
    file, *loaded = run_python(code).split()
    assert Path(file) == ROOT / "export" / "__init__.py"
    assert not BARE_NAMES & set(loaded)


# ---- the checker can fail --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("module", "source", "reason"),
    [
        ("linearize.spec", "from linearize.ops import attention", "spec imports ops"),
        ("linearize.ops.attention", "import linearize.program", "ops imports program"),
        ("linearize.rewriting.editor", "from linearize.mixers.window import Window", "rewriting imports mixers"),
        ("linearize.mixers.window", "from linearize import plan", "mixers imports plan"),
        ("linearize.mixers.window", "from ..plan import Plan", "mixers imports plan"),
        ("linearize.plan", "from linearize.passes.plan.uniform import assign", "plan imports passes"),
        ("linearize.passes.match.sdpa", "from linearize.runtime import model", "passes imports runtime"),
        ("linearize.passes.lower.claim", "import linearize.passes.match", "passes.lower imports passes"),
        ("linearize.runtime.model", "from linearize.api import compile", "runtime imports api"),
        ("linearize.runtime.model", "from linearize import compile", "runtime imports root"),
        ("linearize.runtime.model", "def f():\n    from linearize.api import compile", "runtime imports api"),
        ("linearize.kernels.registry", "from linearize.program import Program", "kernels imports program"),
        ("linearize.export.onnx", "from linearize.calibration import fit", "export imports calibration"),
        ("linearize", "from linearize.api import compile", "root imports api"),
        ("linearize.ops.attention", "import triton", "imports triton"),
        ("linearize.ops.attention", "def f():\n    import triton.language as tl", "imports triton"),
        ("linearize.kernels.cpu.gla", "from triton import jit", "imports triton"),
        (
            "linearize.capture.torch_export",
            "class A:\n    def f(s):\n        import transformers",
            "imports transformers",
        ),
        ("linearize.api", "import importlib\nimportlib.import_module('transformers')", "imports transformers"),
        ("linearize.runtime.model", "from onnxruntime import InferenceSession", "imports onnxruntime"),
        ("linearize.passes.match.sdpa", "from kernels import registry", "imports `kernels`"),
        ("linearize.cli.export", "import export.onnx", "imports `export`"),
        ("linearize.novelty", "", "no area covers"),
    ],
)
def test_a_forbidden_import_is_reported_with_its_reason(module: str, source: str, reason: str) -> None:
    assert any(reason in line for line in violations(module, source))


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("linearize.spec", "import torch\nfrom linearize.errors import LinearizeError"),
        ("linearize.mixers.window", "from linearize.ops.attention import attention\nfrom .base import Mixer"),
        ("linearize.passes.lower.claim", "from linearize.kernels.registry import claim"),
        ("linearize.kernels.triton.gla", "import triton"),
        ("linearize.capture.hf", "def f():\n    import transformers"),
        ("linearize.huggingface.model", "from transformers import GenerationConfig"),
        ("linearize.export.onnx", "import onnx\nimport torch.onnx"),
        ("linearize.export.torchscript", "import torch.export"),
        ("linearize", "def __getattr__(name):\n    from linearize.api import compile"),
        ("linearize", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from linearize.api import compile"),
    ],
)
def test_a_lawful_import_is_accepted(module: str, source: str) -> None:
    assert violations(module, source) == []


def test_relative_imports_of_a_package_resolve_from_the_package() -> None:
    source = "from . import hf\nfrom .hf import load\nfrom ..program import Program"
    expected = ["linearize.capture.hf", "linearize.capture.hf.load", "linearize.program.Program"]
    assert [found.target for found in imports_of("linearize.capture", source, is_package=True)] == expected


def test_the_else_branch_of_type_checking_is_not_lazy() -> None:
    source = "if TYPE_CHECKING:\n    import a\nelse:\n    import b"
    assert [(found.target, found.lazy) for found in imports_of("m", source)] == [("a", True), ("b", False)]
