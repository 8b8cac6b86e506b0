"""Memory while 100,000 tokens are generated, and while a prompt of 100,000 tokens is read, beside the source's.

    python benchmarks/bench_memory.py [--tokens 100000] [--recipe auto] [--markdown docs/memory-figures.md]

Each column is a process of its own; memory is the process's resident set (the private part: anonymous pages), read
when so many tokens have passed. The source's cache is filled by repeating the keys and values of 512 tokens to the
length, because generating into it would take hours, and one token is decoded at each length.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import linearize
from linearize.printing import Figure
from linearize.runtime.generate import Sampling, prompt_pieces, stream
from linearize.runtime.speed import cache_bytes, filled_cache

WAYS = ("generate", "prompt", "source")


def checkpoints(tokens: int) -> list[int]:
    return [point for point in (1000, 2000, 5000, 10000, 20000, 50000, 100000) if point <= tokens]


def resident() -> int:
    """Bytes of anonymous resident memory (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def measure_generate(model: linearize.LinearizedModel, tokens: int) -> dict[int, list[int]]:
    found = {}
    for count, _ in enumerate(stream(model, torch.tensor([[1, 2, 3]]), tokens, Sampling()), 1):
        if count in checkpoints(tokens):
            found[count] = [resident(), model.state_bytes(context=count)]
            print(count, found[count], file=sys.stderr, flush=True)
    return found


@torch.no_grad()
def measure_prompt(model: linearize.LinearizedModel, tokens: int) -> dict[int, list[int]]:
    ids, state, found = torch.arange(tokens).unsqueeze(0) % 1000, None, {}
    points = checkpoints(tokens)
    for piece in prompt_pieces(tokens, 1, model.prompt_graph.vocab_size):
        _, state = model.step(ids[:, piece], state)
        while points and piece.stop >= points[0]:
            found[points.pop(0)] = [resident(), state.nbytes]
    return found


@torch.no_grad()
def measure_source(tokens: int) -> dict[int, list[int]]:
    source = AutoModelForCausalLM.from_pretrained(linearize.demo_model_dir()).eval()
    ids, found = torch.arange(512).unsqueeze(0), {}
    for point in checkpoints(tokens):
        cache = filled_cache(source, ids, point)
        source(ids[:, -1:], past_key_values=cache, use_cache=True)
        found[point] = [resident(), cache_bytes(cache)]
        del cache
    return found


def run(way: str, recipe: str, tokens: int) -> dict[int, list[int]]:
    if way == "source":
        return measure_source(tokens)
    source = AutoModelForCausalLM.from_pretrained(linearize.demo_model_dir()).eval()
    model = linearize.compile(source, recipe, tokens=0, progress=False)
    return measure_generate(model, tokens) if way == "generate" else measure_prompt(model, tokens)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=100_000)
    parser.add_argument("--recipe", default="auto")
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.way:
        print(json.dumps(run(arguments.way, arguments.recipe, arguments.tokens)))
        return
    found = {}
    for way in WAYS:
        command = [sys.executable, __file__, "--way", way, "--recipe", arguments.recipe]
        printed = subprocess.run([*command, "--tokens", str(arguments.tokens)], stdout=subprocess.PIPE, check=True)
        found[way] = json.loads(printed.stdout)
    figure = table(found, arguments.tokens)
    print(figure.markdown())
    if arguments.markdown:
        text = f"# Memory by context\n\nWritten by `python benchmarks/bench_memory.py --markdown {arguments.markdown}`"
        arguments.markdown.write_text(f"{text} (torch {torch.__version__}, recipe {arguments.recipe}).\n\n"
                                      f"{figure.markdown()}\n\n{explained(found)}\n")  # fmt: skip


def table(found: dict[str, dict[str, list[int]]], tokens: int) -> Figure:
    headers = ["tokens", "generating", "its state", "reading a prompt", "its state", "source", "its cache"]
    rows = [
        tuple([f"{point:,}"] + [f"{value / 2**20:.2f}" for way in WAYS for value in found[way][str(point)]])
        for point in checkpoints(tokens)
    ]
    return Figure("memory in MiB, embedded model, one sequence", headers, rows)


def explained(found: dict[str, dict[str, list[int]]]) -> str:
    changes = []
    for way in WAYS:
        values = [bytes_[0] for bytes_ in found[way].values()]
        changes.append(f"{way} {100 * (values[-1] / values[0] - 1):+.1f} %")
    about = (
        "Each column is a process of its own; the numbers are its anonymous resident memory, most of which is Python\n"
        "and torch. The source's cache is filled to the length and one token is decoded at it. A prompt is read in\n"
        "pieces of 2,048 tokens, so the first rows lie within its first piece.\n\n"
    )
    return f"{about}Change of the process's memory from the first row to the last: {', '.join(changes)}."


if __name__ == "__main__":
    main()
