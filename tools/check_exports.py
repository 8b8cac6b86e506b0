"""Every mixer and the main recipes, in both ONNX flavours, against PyTorch: states after random tokens, pieces of any
size, batch 1 and 4 with left padding, and 200 greedy tokens.

    python tools/check_exports.py                         # all of it: an hour of one core
    python tools/check_exports.py --only lolcats slots    # some
    python tools/check_exports.py --json docs/export_checks.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import linearize
from linearize.export import parity
from linearize.mixers import mixer_names

RECIPES = ("lolcats", "lizard", "hylo", "liger", "slots", "auto")
GREEDY = 200


def models() -> Iterator[tuple[str, torch.nn.Module]]:
    from transformers import AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

    yield "embedded", AutoModelForCausalLM.from_pretrained(linearize.demo_model_dir()).eval()
    torch.manual_seed(0)
    sizes = {"vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 2048}
    yield "qwen3", Qwen3ForCausalLM(Qwen3Config(**sizes, **heads)).eval()


def recipes(model: str) -> list[str]:
    own = [name for name in mixer_names() if name not in ("mixture", "keep", "drop")]
    alone = [f"mixer:{name}" for name in own] if model == "qwen3" else []
    return [*RECIPES, *alone]


def as_recipe(name: str) -> Any:
    from linearize.recipe import Recipe

    if not name.startswith("mixer:"):
        return name
    rule = {"mixer": name.removeprefix("mixer:")}
    return Recipe.model_validate({"name": rule["mixer"], "description": "one mixer everywhere", "rules": [rule]})


def check(model: torch.nn.Module, recipe: str, portable: bool) -> dict[str, Any]:
    compiled = linearize.compile(model, as_recipe(recipe), tokens=2048, progress=False)
    with tempfile.TemporaryDirectory() as folder:
        path = linearize.export(compiled, Path(folder) / "out", portable=portable)
        manifest = json.loads((path / "linearize.json").read_text())
    found = manifest["verified"]
    lowerings = sorted({word for row in manifest["lowerings"] for word in row["operators"].values()})
    return {
        "logits": found["largest_logit_difference"],
        "states": found["largest_state_difference"],
        "greedy": f"{found['greedy_tokens_equal']}/{found['greedy_tokens_compared']}",
        "lowered to": lowerings,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="recipes, or mixer:NAME")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parity.STEPS = GREEDY
    rows = []
    for name, model in models():
        for recipe in recipes(name):
            if arguments.only and recipe not in arguments.only:
                continue
            for portable in (False, True):
                flavour = "portable" if portable else "native"
                rows.append({"model": name, "recipe": recipe, "flavour": flavour, **check(model, recipe, portable)})
                print(json.dumps(rows[-1]), flush=True)
                if arguments.json:
                    arguments.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
