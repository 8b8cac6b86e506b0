"""Decode and prefill of exported models against their source, at several contexts: one run, round robin, ratios.

    python benchmarks/bench_export.py --quick                            # fewer rounds, contexts to 4k
    python benchmarks/bench_export.py --json docs/export.json            # what docs/export.md reports
    python benchmarks/bench_export.py --web NODE_FOLDER                  # and fp32 against the web flavour
    python benchmarks/bench_export.py --work FOLDER --part flat          # one part; what FOLDER has is not made again

The parts: steps (all engines by context), flat (the exported graph alone, at the shortest and the longest context),
memory, embedded (8 bits on the embedded model, by recipe), web (WebAssembly under node and in Chromium), large (63 and
152 million parameters in WebAssembly; only when named). FOLDER keeps exports and the figures of finished parts.

The model has the shape of a small Llama and random weights (nothing here depends on their values); one thread. Times
are CPU seconds of this process, the least over the rounds, so that other work on the machine counts less. Memory is the
resident size of a process of its own that read that context (the source's cache is filled, not computed) and decoded.
Engines: the artifact in float32 and int8, onnxruntime with GroupQueryAttention over buffers in place (the source's best
export), and the transformers model with its DynamicCache, which is what `generate` runs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _gqa_baseline import GqaModel, write_gqa_model

import linearize
from linearize.calibration import demo
from linearize.export.runner import Decoder, OnnxModel

CONTEXTS = (512, 4096, 16384)
PIECE = 128
RECIPE = "gla{window=64}"
RECIPES = ("lolcats", "gla", "window")  # of the embedded model
# vocabulary, width, hidden width, layers, heads, kv heads
SHAPES = {
    "11m": (4096, 384, 1024, 6, 6, 2),
    "63m": (16384, 768, 2048, 8, 12, 4),
    "152m": (16384, 1024, 2816, 12, 16, 4),
}
KINDS: dict[str, dict[str, str]] = {"fp32": {}, "int8": {"quantize": "int8"}, "web": {"quantize": "web"}}
Step = Callable[[int], None]  # feeds so many tokens


def source_model(shape: str = "11m") -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    vocabulary, width, hidden, layers, heads, kv_heads = SHAPES[shape]
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=64, max_position_embeddings=32768,
        tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def exports(folder: Path, shape: str, recipe: str, kinds: tuple[str, ...]) -> dict[str, Path]:
    """Exported directories by kind; those that are there already are taken as they are."""
    places = {kind: folder / f"{shape}-{recipe}-{kind}" for kind in kinds}
    missing = [kind for kind, place in places.items() if not place.exists()]
    if missing:
        model = embedded_model() if shape == "embedded" else source_model(shape)
        tokens = 8192 if recipe == "lolcats" else 0
        compiled = linearize.compile(model, recipe, tokens=tokens, progress=False)
        for kind in missing:
            linearize.export(compiled, places[kind], **KINDS[kind])
    return places


def embedded_model() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(linearize.demo_model_dir()).eval()


def prepare(folder: Path) -> None:
    """The exports of all engines, and a check that the hand-built source computes what the source computes."""
    exports(folder, "11m", RECIPE, ("fp32", "int8"))
    if (folder / "gqa.onnx").exists():
        return
    model = source_model()
    write_gqa_model(model, folder / "half.onnx", CONTEXTS[-1] + 4096)
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        difference = np.abs(GqaModel(folder / "half.onnx", 64).step(ids.numpy()) - model(ids).logits.numpy()).max()
    assert difference < 1e-3, f"the source's export is wrong by {difference}"
    (folder / "half.onnx").rename(folder / "gqa.onnx")


def engine(name: str, folder: Path, context: int, whole: bool) -> Step:
    """One engine after `context` tokens; `whole` reads them where that is cheap."""
    if name in ("fp32", "int8"):
        runner = OnnxModel(folder / f"11m-{RECIPE}-{name}", threads=1)
        ids = np.random.default_rng(0).integers(4096, size=(1, context if whole else 512))
        state = runner.prefill(ids)[1]
        return _artifact(runner, [state])
    if name == "gqa":
        cached = GqaModel(folder / "gqa.onnx", context + 1024)
        cached.fill(context)
        return lambda count: _rewound(cached, context, count)
    return _transformers(context)


def _artifact(runner: OnnxModel, state: list[Any]) -> Step:
    decoder, one = Decoder(runner, state[0]), np.ones(1, np.int64)

    def step(count: int) -> None:
        if count == 1:
            decoder.step(one)
        else:
            runner.step(np.ones((1, count), np.int64), state[0])

    return step


def _rewound(cached: GqaModel, context: int, count: int) -> None:
    if cached.tokens > context + 512:
        cached.tokens = context
    cached.step(np.ones((1, count), np.int64))


def _transformers(context: int) -> Step:
    from transformers import DynamicCache

    model = source_model()
    shape = (1, model.config.num_key_value_heads, context, model.config.head_dim)
    cache = DynamicCache(config=model.config)
    for layer in range(model.config.num_hidden_layers):
        cache.update(torch.randn(shape), torch.randn(shape), layer)

    def step(count: int) -> None:
        with torch.no_grad():
            model(torch.ones(1, count, dtype=torch.int64), past_key_values=cache, use_cache=True)
        if cache.get_seq_length() > context + 512:
            cache.crop(context - cache.get_seq_length())

    return step


ENGINES = ("fp32", "int8", "gqa", "transformers")


def measure(folder: Path, contexts: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """Milliseconds a decoded token and a token of a piece, by engine and context."""
    prepare(folder)
    steps = {(name, context): engine(name, folder, context, whole=True) for name in ENGINES for context in contexts}
    best: dict[tuple[str, int, int], float] = {}
    for _ in range(rounds):
        for (name, context), step in steps.items():
            for length, repeats in ((1, 12), (PIECE, 1)):
                key = name, context, length
                best[key] = min(best.get(key, 1e9), milliseconds(step, length, repeats))
    return {
        kind: {name: {str(c): best[name, c, length] for c in contexts} for name in ENGINES}
        for kind, length in (("decode ms", 1), ("prefill ms", PIECE))
    }


def milliseconds(step: Step, length: int, repeats: int) -> float:
    """Of CPU, a token."""
    started = time.process_time()
    for _ in range(repeats):
        step(length)
    return 1e3 * (time.process_time() - started) / (repeats * length)


def flat(folder: Path, contexts: tuple[int, ...], rounds: int) -> dict[str, Any]:
    """A step after the longest context over one after the shortest: median and quartiles of paired ratios.

    One session serves both, the turns alternate, and buffers are allocated anew eight times, as where they lie matters
    more than what is in them.
    """
    prepare(folder)
    found = {}
    for name in ("fp32", "int8"):
        runner = OnnxModel(folder / f"11m-{RECIPE}-{name}", threads=1)
        ids = np.random.default_rng(0).integers(4096, size=(1, contexts[-1]))
        states = [runner.prefill(ids[:, :context])[1] for context in (contexts[0], contexts[-1])]
        ratios: list[float] = []
        for place in range(8):
            steps = [_artifact(runner, [state]) for state in (states if place % 2 else states[::-1])]
            ratios += [_paired(steps if place % 2 else steps[::-1], turn) for turn in range(rounds)]
        low, median, high = np.quantile(ratios, (0.25, 0.5, 0.75))
        found[name] = {"median": float(median), "quartiles": [float(low), float(high)], "pairs": len(ratios)}
    return {f"{contexts[-1]} over {contexts[0]}": found}


def _paired(steps: list[Step], turn: int) -> float:
    """The second's time over the first's; who goes first alternates."""
    took = {}
    for place in (turn % 2, 1 - turn % 2):
        steps[place](1)
        took[place] = milliseconds(steps[place], 1, 20)
    return took[1] / took[0]


def memory(folder: Path, contexts: tuple[int, ...]) -> dict[str, Any]:
    """Resident MiB of a process that holds one engine at one context."""
    prepare(folder)
    found: dict[str, Any] = {}
    for name in ENGINES:
        for context in (contexts[0], contexts[-1]):
            command = [sys.executable, __file__, "--hold", name, str(folder), str(context)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            found.setdefault(name, {})[str(context)] = float(done.stdout.split()[-1])
    return found


def hold(name: str, folder: Path, context: int) -> None:
    """Print the resident size after the context and some steps. The engines that need no torch still import it here."""
    torch.set_num_threads(1)
    step = engine(name, folder, context, whole=True)
    for _ in range(20):
        step(1)
    status = Path("/proc/self/status").read_text()
    print(int(status.split("VmRSS:")[1].split()[0]) / 1024)


def embedded(folder: Path, rounds: int) -> dict[str, Any]:
    """8 bits against float32 on the embedded model, by recipe: perplexity on its own held-out text, CPU milliseconds a
    decoded token, and the median of paired ratios."""
    from linearize.export.loss import log_probabilities, perplexity

    found: dict[str, Any] = {}
    ids = demo_tokens()
    for recipe in RECIPES:
        kinds = ("fp32", "int8", "web") if recipe == "lolcats" else ("fp32", "int8")
        places = exports(folder, "embedded", recipe, kinds)
        runners = {kind: OnnxModel(place, threads=1) for kind, place in places.items()}
        ppl = {kind: perplexity(log_probabilities(runner, ids), ids) for kind, runner in runners.items()}
        steps = {kind: _artifact(runner, [runner.prefill(ids[:1, :128])[1]]) for kind, runner in runners.items()}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(4 * rounds):
            for kind, step in steps.items():
                times[kind].append(milliseconds(step, 1, 30))
        ratio = float(np.median(np.array(times["fp32"]) / np.array(times["int8"])))
        best = {kind: min(each) for kind, each in times.items()}
        found[recipe] = {"perplexity": ppl, "decode ms": best, "float32 over int8": ratio}
    return found


def demo_tokens() -> np.ndarray:
    """Held-out rows of the embedded model's own text, int64 [8, 512]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(linearize.demo_model_dir())
    return demo.text_rows(tokenizer, demo.held_out_documents(), 8, 512).numpy()


def web_steps(folder: Path, node: Path, models: tuple[tuple[str, str], ...], rounds: int) -> dict[str, Any]:
    """In WebAssembly under node, float32 and the web flavour: CPU milliseconds of a step of 1, 8 and 128 tokens."""
    script, found = Path(__file__).parent / "_web_steps.mjs", {}
    for shape, recipe in models:
        places = exports(folder, shape, recipe, ("fp32", "web"))
        command = ["node", str(script), str(node), str(rounds), *(str(place) for place in places.values())]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        found[shape] = dict(zip(places, json.loads(done.stdout), strict=True))
    return found


def web(folder: Path, node: Path, rounds: int) -> dict[str, Any]:
    """Steps under node; and seconds in headless Chromium for 200 tokens after 40 and for one after 512, the least of
    three runs each."""
    models = (("embedded", "lolcats"), ("11m", RECIPE))
    steps = web_steps(folder, node, models, rounds)
    script = Path(__file__).parents[1] / "examples" / "javascript" / "browser.mjs"
    best: dict[str, float] = {}
    for _ in range(3):
        for shape, recipe in models:
            for kind, place in exports(folder, shape, recipe, ("fp32", "web")).items():
                for prompt, count in ((40, 200), (512, 1)):
                    ids = [str(5 + place % 500) for place in range(prompt)]
                    command = ["node", str(script), str(node), str(place), str(count), *ids]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    seconds = float(done.stderr.split("seconds")[-1].split()[0])
                    name = f"{shape}, {kind}, {count} after {prompt}"
                    best[name] = min(best.get(name, seconds), seconds)
    return {"node ms": steps, "Chromium seconds": best}


def show(title: str, rows: dict[str, dict[str, float]], digits: int = 3) -> None:
    columns = list(next(iter(rows.values())))
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[c]:.{digits}f}' for c in columns)} |")


def parts(arguments: argparse.Namespace, folder: Path) -> dict[str, Callable[[], dict[str, Any]]]:
    """What there is to measure, by name."""
    contexts, rounds = (CONTEXTS[:2], 3) if arguments.quick else (CONTEXTS, 8)
    found: dict[str, Callable[[], dict[str, Any]]] = {
        "steps": lambda: measure(folder, contexts, rounds),
        "flat": lambda: flat(folder, contexts, rounds),
        "memory": lambda: memory(folder, contexts),
        "embedded": lambda: embedded(folder, rounds),
    }
    if arguments.web:
        large = (("63m", RECIPE), ("152m", RECIPE))
        found["web"] = lambda: web(folder, arguments.web, rounds)
        found["large"] = lambda: web_steps(folder, arguments.web, large, 3)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, contexts to 4k")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--web", type=Path, metavar="NODE_FOLDER", help="a folder with onnxruntime-web from npm")
    parser.add_argument("--part", action="append", help="only this one, again if it is done (may be repeated)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="keep exports and finished parts there")
    parser.add_argument("--hold", nargs=3, metavar=("ENGINE", "FOLDER", "CONTEXT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        return hold(arguments.hold[0], Path(arguments.hold[1]), int(arguments.hold[2]))
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        run(arguments, arguments.work or Path(place))


def run(arguments: argparse.Namespace, folder: Path) -> None:
    """The chosen parts, each recorded when it is done."""
    folder.mkdir(parents=True, exist_ok=True)
    record, known = folder / "figures.json", parts(arguments, folder)
    figures: dict[str, Any] = json.loads(record.read_text()) if record.exists() else {}
    chosen = arguments.part or [name for name in known if name != "large" and name not in figures]
    unknown = [name for name in chosen if name not in known]
    if unknown:
        raise SystemExit(f"bench_export: no part {unknown[0]!r}; there are {', '.join(known)} (web, large: with --web)")
    for name in chosen:
        figures[name] = known[name]()
        record.write_text(json.dumps(figures, indent=1) + "\n")
        report(name, figures[name])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def report(name: str, figures: dict[str, Any]) -> None:
    if name == "steps":
        for kind, rows in figures.items():
            show(f"{kind} a token", rows)
    elif name == "memory":
        show("resident MiB", figures, 0)
    else:
        print(f"\n{name}:", json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
