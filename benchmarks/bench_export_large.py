"""A model of about 3 GB with random weights, made on the fly: compiled, exported and run, with the peak memory of each.

    python benchmarks/bench_export_large.py            # 2.7 GB of weights, 8.1 GB of disk in TMPDIR
    python benchmarks/bench_export_large.py --layers 2 # a small one

Each step is a process of its own: the source is written tensor by tensor, compiled from disk block by block, exported
as `linearize export DIR` does, the whole comparison with PyTorch included, and run as a user would. Memory is the
most that the system says the process held (VmHWM). The export runs under RLIMIT_DATA (`ulimit -d`) at the bound.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

FACTOR, BESIDE = 1.25, 1 << 30  # the bound: so many times the weights, and so much
RECIPE = "gla{window=32}"
HIDDEN, INNER, HEADS, KV_HEADS, VOCAB = 2048, 6144, 16, 4, 16384


def bound(weights: int) -> int:
    return int(FACTOR * weights) + BESIDE


def make(folder: Path, layers: int) -> int:
    """A Llama in transformers' layout, written tensor by tensor; bytes of its weights."""
    import torch
    from transformers import LlamaConfig

    from linearize.tensorfile import Planned, write_tensors

    folder.mkdir(parents=True)
    LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=layers,
        num_attention_heads=HEADS, num_key_value_heads=KV_HEADS, tie_word_embeddings=True, dtype="float32",
        max_position_embeddings=4096, architectures=["LlamaForCausalLM"],
    ).save_pretrained(folder)  # fmt: skip
    key = HIDDEN // HEADS * KV_HEADS
    shapes = {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (key, HIDDEN), "self_attn.v_proj": (key, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HIDDEN), "mlp.gate_proj": (INNER, HIDDEN), "mlp.up_proj": (INNER, HIDDEN),
        "mlp.down_proj": (HIDDEN, INNER), "input_layernorm": (HIDDEN,), "post_attention_layernorm": (HIDDEN,),
    }  # fmt: skip
    names = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    names |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}

    def drawn(shape: tuple[int, ...]) -> Any:
        return lambda: torch.ones(shape) if len(shape) == 1 else torch.randn(shape).mul_(0.02)

    torch.manual_seed(0)
    planned = {name: Planned(torch.float32, shape, drawn(shape)) for name, shape in names.items()}
    write_tensors(folder / "model.safetensors", planned, {"format": "pt"})
    return sum(one.nbytes for one in planned.values())


def compile_from_disk(folder: Path) -> dict[str, Any]:
    import linearize

    linearize.compile_directory(
        folder / "source", folder / "saved", RECIPE, tokens=0, progress=False, say=lambda line: None
    )
    return {}


def export(folder: Path, limit: int) -> dict[str, Any]:
    """As `linearize export DIR -o OUT --memory LIMIT` does."""
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    import torch

    import linearize
    from linearize.export.write import Options
    from linearize.exporting import forecast

    torch.set_num_threads(1)
    predicted = forecast(folder / "saved", Options()).memory
    path = linearize.export_directory(folder / "saved", folder / "out", memory=limit, say=lambda line: None)
    found = json.loads((path / "linearize.json").read_text())["verified"]
    return {"predicted": predicted, "difference": found["largest_logit_difference"],
            "greedy": f"{found['greedy_tokens_equal']} of {found['greedy_tokens_compared']}"}  # fmt: skip


def run(folder: Path) -> dict[str, Any]:
    import numpy as np

    from linearize.export.runner import OnnxModel

    model = OnnxModel(folder / "out", threads=1)
    model.generate(np.array([[1, 2, 3]]), 8)
    return {}


STEPS = {"compile": compile_from_disk, "export": export, "run": run}


def step(name: str, folder: Path, *rest: int) -> dict[str, Any]:
    """In a process of its own: what it found, with its seconds and its peak in bytes."""
    command = [sys.executable, __file__, "--child", json.dumps([name, str(folder), *rest])]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = json.loads(output.splitlines()[-1])
    extra = ", ".join(f"{key} {mib(value) if key == 'predicted' else value}" for key, value in found.items()
                      if key not in ("seconds", "cpu", "peak"))  # fmt: skip
    print(f"{name}: peak {mib(found['peak'])}, {found['seconds']:.0f} s, {found['cpu']:.0f} of CPU"
          + (f"; {extra}" if extra else ""), flush=True)  # fmt: skip
    return found


def child(name: str, folder: str, *rest: int) -> None:
    started, cpu = time.perf_counter(), time.process_time()
    found = STEPS[name](Path(folder), *rest)  # type: ignore[operator]
    status = Path("/proc/self/status").read_text()  # not getrusage, whose peak a child takes over from its parent
    peak = int(status.split("VmHWM:")[1].split()[0]) * 1024
    times = {"seconds": time.perf_counter() - started, "cpu": time.process_time() - cpu}
    print(json.dumps({**times, "peak": peak, **found}))


def mib(count: float) -> str:
    return f"{count / 2**20:,.0f} MiB"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(*json.loads(arguments.child))
        return
    folder = Path(tempfile.mkdtemp(prefix="bench-export-large-"))
    try:
        weights = make(folder / "source", arguments.layers)
        limit = bound(weights)
        print(f"weights {mib(weights)}; bound {FACTOR} times that and 1 GiB, {mib(limit)}", flush=True)
        step("compile", folder)
        exported = step("export", folder, limit)
        loaded = step("run", folder)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    passed = [name for name, found in (("export", exported), ("run", loaded)) if found["peak"] > limit]
    if passed or exported["peak"] > exported["predicted"]:
        raise SystemExit(f"more than the bound: {', '.join(passed) or 'the forecast'}")


if __name__ == "__main__":
    main()
