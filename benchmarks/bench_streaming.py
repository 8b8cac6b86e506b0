"""Peak memory of compiling from disk: does it grow with the layers, does the forecast hold, does a limit?

    python benchmarks/bench_streaming.py                       both widths, 12 and 48 layers; about 20 minutes
    python benchmarks/bench_streaming.py --width 192 --layers 3 6 --tokens 1024    to see that it runs
    python benchmarks/bench_streaming.py --layers 24 --tokens 0 --distill 1024 --no-limit    distilled, not fitted

The embedded model's architecture, widened and with random weights, is fitted to random tokens, each in a process of its
own. Memory is what the system says the process held (VmHWM), from the forecast to the written directory, and over the
whole run, capture included. The last run has RLIMIT_DATA (`ulimit -d`) set below the bytes of its weights.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LENGTH, ROWS, VOCAB = 128, 4, 1024
RECIPE = "lolcats{window=32,features=32}"


def make(folder: Path, layers: int, width: int) -> int:
    """Write a model layer by layer; its bytes."""
    import torch
    from transformers import LlamaConfig

    from linearize.tensorfile import Planned, write_tensors

    folder.mkdir(parents=True)
    heads = width // 32
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=width, intermediate_size=width * 8 // 3 // 32 * 32, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads // 3, head_dim=32, max_position_embeddings=2048,
        tie_word_embeddings=True, architectures=["LlamaForCausalLM"], dtype="float32",
    )  # fmt: skip
    config.save_pretrained(folder)
    key, inner = heads // 3 * 32, config.intermediate_size
    shapes = {
        "self_attn.q_proj": (width, width), "self_attn.k_proj": (key, width), "self_attn.v_proj": (key, width),
        "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,),
    }  # fmt: skip
    names = {"model.embed_tokens.weight": (VOCAB, width), "model.norm.weight": (width,)}
    names |= {f"model.layers.{i}.{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}

    def drawn(shape: tuple[int, ...]) -> Any:
        return lambda: torch.ones(shape) if len(shape) == 1 else torch.randn(shape) * shape[1] ** -0.5

    planned = {name: Planned(torch.float32, shape, drawn(shape)) for name, shape in names.items()}
    write_tensors(folder / "model.safetensors", planned, {"format": "pt"})
    return sum(one.nbytes for one in planned.values())


def fit(source: Path, output: Path, tokens: int, distill: int, spill: str, limit: int) -> dict[str, Any]:
    """In a process of its own: compile, and what it took."""
    import time

    import torch

    from linearize import on_disk
    from linearize.calibration.limits import peak_memory, reset_peak
    from linearize.distill import Distill
    from linearize.recipe import Recipe

    torch.set_num_threads(1)
    if limit:
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    generator = torch.Generator().manual_seed(0)
    count = max(tokens, distill * 8 // 7) // (ROWS * LENGTH)
    data = [torch.randint(0, VOCAB, (ROWS, LENGTH), generator=generator) for _ in range(count)]
    found: dict[str, Any] = {}
    forecast = on_disk.forecast

    def watched(*args: Any) -> Any:
        found["capture_peak"] = peak_memory()
        known = forecast(*args)
        found.update(predicted=known.memory, predicted_seconds=known.seconds, block=known.block, text=str(known))
        reset_peak()
        found["started"] = time.perf_counter()
        return known

    add = on_disk.with_distillation

    def watched_again(*args: Any) -> Any:
        known = add(*args)
        found.update(predicted=known.memory, predicted_seconds=known.seconds, text=str(known))
        return known

    on_disk.forecast, on_disk.with_distillation = watched, watched_again
    how = Distill(tokens=distill, lengths=(LENGTH,), batch=ROWS)
    recipe = Recipe.load(RECIPE).model_copy(update={"distill": how})
    model = on_disk.compile_directory(
        source, output, recipe, calibration=data, tokens=tokens, progress=False, spill=spill,  # type: ignore[arg-type]
        say=lambda text: None,
    )  # fmt: skip
    found["seconds"] = time.perf_counter() - found.pop("started")
    found["peak"] = peak_memory()
    found["error"] = model.report.mean_error()
    found["end_to_end"] = model.report.end_to_end.model_dump() if model.report.end_to_end is not None else None
    return found


def measure(layers: int, width: int, tokens: int, distill: int, spill: str, limited: bool) -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp(prefix="bench-streaming-"))
    try:
        size = make(folder / "source", layers, width)
        limit = int(size * 0.9) if limited else 0
        command = [sys.executable, __file__, "--child", json.dumps([str(folder), tokens, distill, spill, limit])]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = json.loads(output.splitlines()[-1])
        return {"layers": layers, "width": width, "weights": size, "limit": limit, **found}
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def row(one: dict[str, Any]) -> str:
    sizes = [one[name] / 2**20 for name in ("weights", "block", "capture_peak", "predicted", "peak")]
    limit = f"{one['limit'] / 2**20:.0f}" if one["limit"] else ""
    cells = [str(one["layers"]), str(one["width"]), *(f"{size:.0f}" for size in sizes), limit]
    return "| " + " | ".join([*cells, f"{one['seconds']:.0f}", f"{one['predicted_seconds']:.0f}"]) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--layers", type=int, nargs="+", default=[12, 48])
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--distill", type=int, default=0, metavar="TOKENS")
    parser.add_argument("--spill", default="disk")
    parser.add_argument("--no-limit", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        folder, *rest = json.loads(given.child)
        print(json.dumps(fit(Path(folder) / "source", Path(folder) / "out", *rest)))
        return
    print("| layers | width | weights, MiB | block | peak of capture | predicted | peak | limit | s | expected |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    runs = [(layers, False) for layers in given.layers] + ([] if given.no_limit else [(given.layers[-1], True)])
    rows = []
    for layers, limited in runs:
        rows.append(measure(layers, given.width, given.tokens, given.distill, given.spill, limited))
        print(row(rows[-1]), flush=True)
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
