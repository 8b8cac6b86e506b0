"""Every mixer and the main recipes, in both ONNX flavours, against PyTorch: states after random tokens, pieces of any
size, batch 1 and 4 with left padding, and 200 greedy tokens. The table is docs/export_checks.json.

    python tools/check_exports.py                         # what is missing or older than the code: hours, if all is
    python tools/check_exports.py --only lolcats slots    # of these recipes, or mixer:NAME
    python tools/check_exports.py --list                  # what would be done

It can be stopped at any time: each row is kept as soon as it is there, with a hash of the code that decides it (what
writes, runs and compares the graph, the operators, the passes that rewrite and lower, the mixers in it, the versions of
torch, onnxscript and onnxruntime). Comments and docstrings do not count. A row whose hash is today's is not done again.
"""

from __future__ import annotations

import argparse
import ast
import functools
import hashlib
import importlib.metadata
import inspect
import json
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

import linearize
from linearize.errors import LinearizeError
from linearize.export import parity
from linearize.files import write_atomically
from linearize.mixers import mixer_class, mixer_names
from linearize.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
TABLE = ROOT / "docs" / "export_checks.json"
RECIPES = ("lolcats", "lizard", "hylo", "liger", "slots", "auto")
GREEDY = 200
SHARED = ("export", "linearize/ops", "linearize/mixers", "passes/rewrite", "passes/lower")
# of export/: other formats and flavours, and what only describes what was found
ELSEWHERE = {"blocks", "genai", "loss", "manifest", "probe", "pt2", "pte", "quantize", "torchscript", "write"}
PACKAGES = ("torch", "onnxscript", "onnxruntime")
KEPT = {"mixer": "keep"}
SMALL = {"window": 16, "keep": 32}  # tokens are evicted, or merged, well before the 150 that come first
RULES: dict[str, list[dict[str, Any]]] = {
    "citrus": [{"mixer": "citrus", "options": SMALL}],
    "drop": [KEPT, {"mixer": "drop", "layers": "list", "indices": (1,)}],
    "mixture": [{"mixer": "mixture", "options": {"parts": [
        {"mixer": "window", "kv_heads": [1], "options": {"window": 24}},
        {"mixer": "lolcats", "kv_heads": [0], "options": {"window": 16}},
    ]}}],
    "moa": [{"mixer": "moa", "options": {"start": [24, 48], "sinks": 4}}],
    "q_filters": [{"mixer": "q_filters", "options": SMALL}],
    "share": [KEPT, {"mixer": "share", "layers": "list", "indices": (1,), "options": {"of": 0}}],
    "slots": [{"mixer": "slots", "options": {"window": 16, "slots": 24, "rounds": 1, "sinks": 1}}],
}  # fmt: skip


class Case(NamedTuple):
    model: str
    recipe: str
    flavour: str


def cases() -> list[Case]:
    """In the table's order. A mixer alone stands as mixer:NAME, on the small Qwen3."""
    recipes = {"embedded": RECIPES, "qwen3": (*RECIPES, *(f"mixer:{name}" for name in mixer_names()))}
    return [
        Case(model, recipe, flavour)
        for model, rows in recipes.items()
        for recipe in rows
        for flavour in ("native", "portable")
    ]


def build(model: str) -> torch.nn.Module:
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    if model == "embedded":
        return AutoModelForCausalLM.from_pretrained(linearize.demo_model_dir()).eval()
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048}
    return Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).eval()


def recipe_of(name: str) -> Recipe:
    if not name.startswith("mixer:"):
        return Recipe.load(name)
    mixer = name.removeprefix("mixer:")
    rules = RULES.get(mixer, [{"mixer": mixer}])
    return Recipe.model_validate({"name": mixer, "description": "one mixer everywhere", "rules": rules})


@functools.lru_cache(maxsize=1)  # for both flavours
def compiled_model(model: str, recipe: str) -> Any:
    return linearize.compile(build(model), recipe_of(recipe), tokens=2048, progress=False)


def check(case: Case) -> dict[str, Any]:
    """Compile, export, compare; what the manifest says of it. Raises LinearizeError where that fails."""
    compiled = compiled_model(case.model, case.recipe)
    with tempfile.TemporaryDirectory() as folder:
        path = linearize.export(compiled, Path(folder) / "out", portable=case.flavour == "portable")
        manifest = json.loads((path / "linearize.json").read_text())
    found = manifest["verified"]
    lowerings = sorted({word for row in manifest["lowerings"] for word in row["operators"].values()})
    return {
        "logits": found["largest_logit_difference"],
        "states": found["largest_state_difference"],
        "greedy": f"{found['greedy_tokens_equal']}/{found['greedy_tokens_compared']}",
        "lowered to": lowerings,
    }


def code_of(recipe: str) -> str:
    """A hash of what decides a row's result."""
    own = {Path(inspect.getfile(base)) for name in mixers_in(recipe_of(recipe)) for base in mixer_class(name).__mro__
           if base.__module__.startswith("linearize.")}  # fmt: skip
    files = [Path(__file__)]
    for folder in SHARED:
        files += [path for path in sorted((ROOT / folder).glob("*.py")) if path.stem not in ELSEWHERE]
    digest = hashlib.sha256(recipe_of(recipe).model_dump_json().encode())
    for name in PACKAGES:
        digest.update(f"{name} {importlib.metadata.version(name)}".encode())
    for path in files:
        text = path.read_text()
        if "\n@register_mixer\n" not in text or path in own:
            digest.update(meaning(text).encode())
    return digest.hexdigest()[:12]


def mixers_in(recipe: Recipe) -> set[str]:
    """Names of the mixers, those within others' options too."""
    return set(_named([rule.model_dump() for rule in recipe.rules]))


def _named(tree: Any) -> Iterator[str]:
    if isinstance(tree, dict):
        if isinstance(tree.get("mixer"), str):
            yield tree["mixer"]
        tree = list(tree.values())
    if isinstance(tree, list | tuple):
        for item in tree:
            yield from _named(item)


def meaning(source: str) -> str:
    """A source text without comments, layout and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:]
    return ast.dump(tree)


def read(path: Path) -> dict[Case, dict[str, Any]]:
    if not path.exists():
        return {}
    rows = json.loads(path.read_text())
    return {Case(row["model"], row["recipe"], row["flavour"]): row for row in rows}


def write(path: Path, rows: dict[Case, dict[str, Any]], order: Iterable[Case]) -> None:
    ordered = [rows[case] for case in order if case in rows]
    write_atomically(path, (json.dumps(ordered, indent=1) + "\n").encode())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="recipes, or mixer:NAME")
    parser.add_argument("--list", action="store_true", help="say what would be done, and stop")
    parser.add_argument("--json", type=Path, default=TABLE, help="the table that is read and completed")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parity.STEPS = GREEDY
    codes = {recipe: code_of(recipe) for recipe in {case.recipe for case in cases()}}
    rows = read(arguments.json)
    wanted = [case for case in cases() if not arguments.only or case.recipe in arguments.only]
    todo = [case for case in wanted if rows.get(case, {}).get("code") != codes[case.recipe]]
    print(f"{len(wanted) - len(todo)} of {len(wanted)} rows are of this code", flush=True)
    failed = []
    for case in [] if arguments.list else todo:
        started = time.process_time()
        try:
            found = check(case)
        except LinearizeError as error:
            rows.pop(case, None)
            failed.append(case)
            print(f"FAILED {' '.join(case)}: {error}", flush=True)
        else:
            rows[case] = {**case._asdict(), "code": codes[case.recipe], **found}
            print(f"{time.process_time() - started:.0f} s {json.dumps(rows[case])}", flush=True)
        write(arguments.json, rows, cases())
    if arguments.list:
        print("\n".join(" ".join(case) for case in todo))
    if failed:
        raise SystemExit(f"{len(failed)} failed: " + ", ".join(" ".join(case) for case in failed))


if __name__ == "__main__":
    main()
