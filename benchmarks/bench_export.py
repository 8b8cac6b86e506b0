"""Decode and prefill of exported models against their source, at several contexts: one run, round robin, ratios.

    python benchmarks/bench_export.py --quick                            # fewer rounds, contexts to 4k
    python benchmarks/bench_export.py --json docs/export.json            # what docs/export.md reports
    python benchmarks/bench_export.py --web NODE_FOLDER                  # and fp32 against the web flavour in Chromium

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
Step = Callable[[int], None]  # feeds so many tokens


def source_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=32768, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def prepare(folder: Path, for_web: bool) -> None:
    """The exports of all engines, and a check that the hand-built source computes what the source computes."""
    model = source_model()
    write_gqa_model(model, folder / "gqa.onnx", CONTEXTS[-1] + 4096)
    ids = torch.arange(1, 41)[None]
    with torch.no_grad():
        difference = np.abs(GqaModel(folder / "gqa.onnx", 64).step(ids.numpy()) - model(ids).logits.numpy()).max()
    assert difference < 1e-3, f"the source's export is wrong by {difference}"
    compiled = linearize.compile(model, RECIPE, tokens=0, progress=False)
    linearize.export(compiled, folder / "fp32")
    linearize.export(compiled, folder / "int8", quantize="int8")
    if for_web:
        linearize.export(compiled, folder / "web", quantize="web")


def engine(name: str, folder: Path, context: int, whole: bool) -> Step:
    """One engine after `context` tokens; `whole` reads them where that is cheap."""
    if name in ("fp32", "int8"):
        runner = OnnxModel(folder / name, threads=1)
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
    steps = {(name, context): engine(name, folder, context, whole=True) for name in ENGINES for context in contexts}
    best: dict[tuple[str, int, int], float] = {}
    growth: dict[str, list[float]] = {name: [] for name in ENGINES}
    for _ in range(rounds):
        now: dict[tuple[str, int], float] = {}
        for (name, context), step in steps.items():
            for length, repeats in ((1, 12), (PIECE, 1)):
                started = time.process_time()
                for _ in range(repeats):
                    step(length)
                seconds = (time.process_time() - started) / (repeats * length)
                key = name, context, length
                best[key] = min(best.get(key, seconds), seconds)
                if length == 1:
                    now[name, context] = seconds
        for name, ratios in growth.items():
            ratios.append(now[name, contexts[-1]] / now[name, contexts[0]])
    paired = {name: {f"{contexts[-1]} over {contexts[0]}": float(np.median(growth[name]))} for name in ENGINES}
    return {"decode, median of paired ratios": paired} | {
        kind: {name: {str(c): 1e3 * best[name, c, length] for c in contexts} for name in ENGINES}
        for kind, length in (("decode ms", 1), ("prefill ms", PIECE))
    }


def memory(folder: Path, contexts: tuple[int, ...]) -> dict[str, Any]:
    """Resident MiB of a process that holds one engine at one context."""
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
    """int8 against float32 on the embedded model: perplexity on its own held-out text, CPU time a decoded token."""
    from transformers import AutoModelForCausalLM

    from linearize.export.loss import log_probabilities, perplexity

    model = AutoModelForCausalLM.from_pretrained(linearize.demo_model_dir()).eval()
    compiled = linearize.compile(model, "lolcats", tokens=8192, progress=False)
    kinds: dict[str, dict[str, str]] = {"fp32": {}, "int8": {"quantize": "int8"}, "web": {"quantize": "web"}}
    for kind, options in kinds.items():
        linearize.export(compiled, folder / f"demo-{kind}", **options)
    runners = {kind: OnnxModel(folder / f"demo-{kind}", threads=1) for kind in kinds}
    ids = demo_tokens()
    ppl = {kind: perplexity(log_probabilities(runner, ids), ids) for kind, runner in runners.items()}
    states = {kind: runner.prefill(ids[:1, :128])[1] for kind, runner in runners.items()}
    best = dict.fromkeys(kinds, 1e9)
    for _ in range(rounds):
        for kind, runner in runners.items():
            decoder, token = Decoder(runner, states[kind]), ids[0, :1]
            started = time.process_time()
            for _ in range(30):
                decoder.step(token)
            best[kind] = min(best[kind], 1e3 * (time.process_time() - started) / 30)
    return {"perplexity": ppl, "decode ms": best}


def demo_tokens() -> np.ndarray:
    """Held-out rows of the embedded model's own text, int64 [8, 512]."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(linearize.demo_model_dir())
    return demo.text_rows(tokenizer, demo.held_out_documents(), 8, 512).numpy()


def web(folder: Path, node: Path) -> dict[str, float]:
    """Seconds in headless Chromium, float32 and the web flavour, for 200 tokens after 40 and for one after 512: the
    least of three runs each."""
    script = Path(__file__).parents[1] / "examples" / "javascript" / "browser.mjs"
    best: dict[str, float] = {}
    for _ in range(3):
        for kind in ("demo-fp32", "demo-web", "fp32", "web"):
            for prompt, count in ((40, 200), (512, 1)):
                ids = [str(5 + place % 500) for place in range(prompt)]
                command = ["node", str(script), str(node), str(folder / kind), str(count), *ids]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                seconds, name = float(done.stderr.split("seconds")[-1].split()[0]), f"{kind}, {count} after {prompt}"
                best[name] = min(best.get(name, seconds), seconds)
    return best


def show(title: str, rows: dict[str, dict[str, float]], digits: int = 3) -> None:
    columns = list(next(iter(rows.values())))
    print(f"\n| {title} | {' | '.join(columns)} |\n|---|{'---|' * len(columns)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[c]:.{digits}f}' for c in columns)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds, contexts to 4k")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--web", type=Path, metavar="NODE_FOLDER", help="a folder with onnxruntime-web from npm")
    parser.add_argument("--hold", nargs=3, metavar=("ENGINE", "FOLDER", "CONTEXT"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.hold:
        return hold(arguments.hold[0], Path(arguments.hold[1]), int(arguments.hold[2]))
    torch.set_num_threads(1)
    contexts, rounds = (CONTEXTS[:2], 3) if arguments.quick else (CONTEXTS, 8)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        prepare(folder, bool(arguments.web))
        figures = measure(folder, contexts, rounds)
        for kind in ("decode ms", "prefill ms"):
            show(f"{kind} a token", figures[kind])
        show("decode, median of paired ratios", figures["decode, median of paired ratios"])
        figures["resident MiB"] = memory(folder, contexts)
        show("resident MiB", figures["resident MiB"], 0)
        figures["embedded"] = embedded(folder, rounds)
        print("\nembedded model:", json.dumps(figures["embedded"]))
        if arguments.web:
            figures["Chromium seconds"] = web(folder, arguments.web)
            print("in Chromium:", json.dumps(figures["Chromium seconds"]))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
