"""A model of about 3 GB with random weights, made on the fly: compiled, exported and run, with the peak memory of each.

    python benchmarks/bench_export_large.py            # needs 4 times the weights in memory and in TMPDIR
    python benchmarks/bench_export_large.py --layers 2 # a small one

The comparison with PyTorch is cut to short inputs; everything else is what `linearize export` does.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

BOUND = 4.0  # peak memory over the size of the weights that must not be passed

LOAD = """
import sys, time
import numpy as np
from linearize.export.runner import OnnxModel
started = time.perf_counter()
model = OnnxModel(sys.argv[1], threads=1)
model.generate(np.array([[1, 2, 3]]), 3)
status = open("/proc/self/status").read()  # not getrusage, whose peak a child takes over from its parent
print(time.perf_counter() - started, int(status.split("VmHWM:")[1].split()[0]) / 1024)
"""


def peak() -> float:
    """MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--recipe", default="gla{window=32}")
    arguments = parser.parse_args()
    import linearize
    from linearize.export import loss, parity

    parity.LENGTHS, parity.BATCHES, parity.WARM, parity.PROMPT, parity.STEPS = (1, 7), (1,), 8, 8, 2
    loss.ROWS, loss.TOKENS = 1, 16
    torch.set_num_threads(1)
    model = large(arguments.layers)
    weights = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
    print(f"weights {weights:,.0f} MiB; made: peak {peak():,.0f} MiB", flush=True)
    compiled = linearize.compile(model, arguments.recipe, tokens=0, progress=False)
    print(f"compiled: peak {peak():,.0f} MiB", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        started = time.perf_counter()
        path = linearize.export(compiled, Path(folder) / "out")
        size = (path / "model.safetensors").stat().st_size / 2**20
        seconds = time.perf_counter() - started
        print(
            f"exported in {seconds:.0f} s: {size:,.0f} MiB of weights; peak {peak():,.0f} MiB, {peak() / weights:.2f} x"
        )
        loaded = subprocess.run([sys.executable, "-c", LOAD, str(path)], capture_output=True, text=True, check=True)
        elapsed, used = (float(word) for word in loaded.stdout.split())
        print(f"loaded and run in {elapsed:.0f} s: peak {used:,.0f} MiB, {used / weights:.2f} x", flush=True)
    if max(peak(), used) > BOUND * weights + 1024:
        raise SystemExit(f"more than {BOUND} times the weights and 1 GiB")


def large(layers: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16384, hidden_size=2048, intermediate_size=6144, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=4, tie_word_embeddings=True, max_position_embeddings=4096,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


if __name__ == "__main__":
    main()
