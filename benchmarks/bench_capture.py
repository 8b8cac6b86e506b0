"""Seconds of every pass of capture and matching by number of layers: do they grow linearly?

    python benchmarks/bench_capture.py                # Llama-3.1-8B's shape, meta device, 8, 32, 128 layers
    python benchmarks/bench_capture.py --layers 8 32 --json out/capture.json

Each size runs in its own process. Seconds are what this machine took; read the growth: the last column is the exponent
p of seconds ~ layers^p between the smallest and the largest size (1 linear, 2 quadratic; pieces of a few milliseconds
are noise).
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import platform
import resource
import time
from pathlib import Path
from typing import Any

from rich.console import Console


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 32, 128])
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments = parser.parse_args()
    runs = []
    for layers in sorted(arguments.layers):
        runs.append(in_own_process(layers))
        print(f"{layers} layers: {runs[-1]['total']:.1f} s, {runs[-1]['peak_mib']:.0f} MiB at most", flush=True)
    Console().print(table(runs))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n")


def in_own_process(layers: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(layers, sender))
    process.start()
    sender.close()
    figures: dict[str, Any] = receiver.recv()
    process.join()
    return figures


def measure(layers: int, sender: Any) -> None:
    """`capture` on the meta device: seconds by pass, nodes, sites, the peak of the process's memory."""
    import torch

    from linearize.capture import capture

    model = llama(layers)
    started = time.perf_counter()
    program = capture(model)
    total = time.perf_counter() - started
    sender.send(
        {
            "layers": layers,
            "nodes": len(program.graph.nodes),
            "matched": len(program.matched),
            "found": len(program.sites),
            "passes": {record.name: round(record.seconds, 3) for record in program.history},
            "total": round(total, 2),
            "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
            "torch": torch.__version__,
        }
    )


def llama(layers: int) -> Any:
    """Llama-3.1-8B's shape (hidden 4096, 32 query and 8 key-value heads of 128) with that many layers, no weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128_256, hidden_size=4096, intermediate_size=14_336, num_hidden_layers=layers,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=131_072, rms_norm_eps=1e-5,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    )  # fmt: skip
    with torch.device("meta"):
        return LlamaForCausalLM(config).eval()


def table(runs: list[dict[str, Any]]) -> Any:
    """A row a pass: seconds by number of layers, and the exponent of growth."""
    from rich.table import Table

    made = Table(box=None, pad_edge=False)
    made.add_column("seconds of")
    for head in (*(f"{run['layers']} layers" for run in runs), "exponent"):
        made.add_column(head, justify="right", no_wrap=True)
    for name in runs[0]["passes"]:
        made.add_row(name, *(f"{run['passes'][name]:.2f}" for run in runs), growth(runs, name))
    made.add_row("all, with checks", *(f"{run['total']:.2f}" for run in runs), growth(runs, None))
    made.add_row("nodes", *(f"{run['nodes']:,}" for run in runs))
    made.add_row("attentions matched", *(f"{run['matched']} of {run['found']}" for run in runs))
    made.add_row("peak memory, MiB", *(f"{run['peak_mib']:,}" for run in runs))
    return made


def growth(runs: list[dict[str, Any]], name: str | None) -> str:
    first, last = ((run["total"] if name is None else run["passes"][name]) for run in (runs[0], runs[-1]))
    times = runs[-1]["layers"] / runs[0]["layers"]
    return f"{math.log(last / first) / math.log(times):.2f}" if times > 1 and min(first, last) > 0.01 else "-"


def machine() -> dict[str, Any]:
    return {"system": platform.platform(), "python": platform.python_version(), "cores": os.cpu_count()}


if __name__ == "__main__":
    main()
