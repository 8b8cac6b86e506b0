"""The CPU kernels against PyTorch's SDPA on one thread, as ratios within one process.

    python benchmarks/bench_kernels_cpu.py                                   # about 3 minutes on a quiet core
    python benchmarks/bench_kernels_cpu.py --quick                           # short lengths, one round, no memory
    python benchmarks/bench_kernels_cpu.py --json docs/kernels_cpu.json --markdown docs/kernel-figures.md

The machine's own ceilings come first: copy bandwidth and the rate of float32 matrix products. Each case is compared
with the float64 token loop on its first tokens (causal: they do not see the rest) before it is timed, and is not timed
where it is wrong. Times are CPU time of the thread, which other processes disturb less than the clock, in rounds that
take all competitors in turn; a ratio is the median of the rounds' ratios. Memory is a process's peak beyond its inputs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import linearize.kernels  # noqa: F401  (puts the kernels in use)
from linearize.kernels import recording
from linearize.ops import OPERATORS
from linearize.printing import table

HEADS, DIM, WINDOW, FEATURES, CACHE = 8, 64, 64, 128, 8192
CHECKED, TOLERANCE = 224, 2e-5
LONG = 65536
BARS = {
    "gla": {4096: 4.0, 16384: 14.0},
    "hybrid": {4096: 2.0, 16384: 8.0},
    "delta": {4096: 1.5, 16384: 4.0},
    "gla, training": {4096: 2.0},
    "hybrid step": {CACHE: 3.0},
}
MOST_MEMORY = 4.0
Call = Callable[[], Any]


@dataclass
class Case:
    """An operator's call on T tokens, and what it is compared with."""

    name: str
    length: int
    op: str
    args: tuple[Any, ...]
    keywords: dict[str, Any]

    def run(self) -> Any:
        return OPERATORS[self.op].overload(*self.args, **self.keywords)

    def error(self) -> float:
        """The largest difference of the first tokens' outputs from the float64 token loop, over its largest value."""
        args = [first(x, self.length) for x in self.args]
        expected = OPERATORS[self.op].recurrence(*args, **self.keywords)[0]
        found = self.run()[0][:, : expected.shape[1]].double()
        return float((found - expected).abs().max() / expected.abs().max())


@dataclass
class Row:
    """CPU ms of a case and of SDPA, their ratio, and the bar that the ratio should reach."""

    case: str
    length: int
    kernel: str
    error: float
    ms: float
    sdpa_ms: float
    ratio: float
    bar: float | None

    @property
    def held(self) -> bool:
        return self.bar is None or self.ratio >= self.bar


def first(x: Any, length: int) -> Any:
    """The part of an input that the first `CHECKED` tokens see, in float64; delay lines have a window before them."""
    if not isinstance(x, Tensor):
        return x
    if x.ndim > 1 and x.shape[1] in (length, length + WINDOW):
        x = x[:, : min(CHECKED, length) + x.shape[1] - length]
    return x.double() if x.is_floating_point() else x


# ---- what is measured ------------------------------------------------------------------------------------------------


def cases(length: int) -> Iterator[Case]:
    q, k, v = (torch.randn(1, length, HEADS, DIM) for _ in range(3))
    g, gates = -0.1 * torch.rand(1, length, HEADS), -0.1 * torch.rand(1, length, HEADS, DIM)
    beta, scale = torch.rand(1, length, HEADS), {"scale": DIM**-0.5}
    line_k, line_v = (torch.randn(1, length + WINDOW, HEADS, DIM) for _ in range(2))
    mask = torch.ones(1, length + WINDOW, dtype=torch.bool)
    features = tuple(torch.rand(1, length, HEADS, FEATURES) for _ in range(2))
    windowed = {"window": WINDOW, **scale}
    yield Case("gla", length, "gla_chunk", (q, k, v, g), scale)
    yield Case("gla, no gates", length, "gla_chunk", (q, k, v), scale)
    yield Case("gla by channel", length, "gla_vec_chunk", (q, k, v, gates), scale)
    yield Case("delta", length, "delta_chunk", (q, k, v, beta, g), {**scale, "l2norm": True})
    yield Case("hybrid", length, "hybrid_chunk", (q, line_k, line_v, mask, *features), windowed)
    yield Case("window", length, "hybrid_chunk", (q, line_k, line_v, mask), windowed)
    for count in (64, 128):
        yield Case(f"slots {count}", length, "slots_chunk", (q, k, v, *empty_slots(length, count)), slots_options())


def empty_slots(length: int, count: int) -> tuple[Tensor, ...]:
    ring, slots = torch.zeros(1, WINDOW, HEADS, DIM), torch.zeros(1, HEADS, count, DIM)
    before = torch.zeros(1, dtype=torch.int64)
    return (torch.ones(1, length, dtype=torch.bool), before, ring, ring, slots, slots, slots[..., 0])


def slots_options() -> dict[str, Any]:
    """Two blocks of 32, so as many keys near by as the window has."""
    return {"window": WINDOW // 2, "scale": DIM**-0.5, "rounds": 4}


def step_case(context: int) -> Case:
    """A decoding step of the hybrid in one call: its cost does not depend on how many tokens came before."""
    q, k, v = (torch.randn(1, 1, HEADS, DIM) for _ in range(3))
    ring = (torch.randn(1, WINDOW, HEADS, DIM), torch.randn(1, WINDOW, HEADS, DIM), torch.ones(1, WINDOW) > 0)
    maps = (torch.randn(HEADS, DIM, FEATURES // 2), torch.randn(HEADS, DIM, FEATURES // 2), torch.zeros(HEADS))
    states = (torch.rand(1, HEADS, FEATURES, DIM), torch.rand(1, HEADS, FEATURES))
    mask, positions = torch.ones(1, 1, dtype=torch.bool), torch.tensor([[context]])
    args = (q, k, v, mask, positions, *ring, None, None, *maps, None, *states)
    return Case("hybrid step", context, "hybrid_ring", args, {"window": WINDOW, "scale": DIM**-0.5})


def sdpa(length: int, queries: int | None = None) -> Call:
    q, k, v = (torch.randn(1, HEADS, size, DIM) for size in (queries or length, length, length))
    return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=queries is None)


def training(run: Call, inputs: list[Tensor]) -> Call:
    def step() -> None:
        torch.autograd.grad(run().sum(), inputs)

    return step


# ---- measuring -------------------------------------------------------------------------------------------------------


def timed(call: Call, times: int = 1) -> float:
    started = time.thread_time()
    for _ in range(times):
        call()
    return (time.thread_time() - started) / times * 1000


def in_turn(base: Call, others: dict[str, Call], rounds: int, times: int = 1) -> dict[str, tuple[float, float, float]]:
    """Of each competitor: (its ms, the base's ms, base / its), medians over rounds that take all in turn."""
    for call in (base, *others.values()):
        call()
    ms = [[timed(base, times), *(timed(call, times) for call in others.values())] for _ in range(rounds)]
    return {
        name: (median(row[i] for row in ms), median(row[0] for row in ms), median(row[0] / row[i] for row in ms))
        for i, name in enumerate(others, 1)
    }


def measure(found: list[Case], base: Call, rounds: int, times: int = 1) -> list[Row]:
    """Check all, then time those that are right."""
    rows, right, errors, kernels = [], {}, {}, {}
    for case in found:
        with recording() as calls, torch.no_grad():
            errors[case.name] = case.error()
        kernels[case.name] = calls[-1].kernel
        if errors[case.name] <= TOLERANCE:
            right[case.name] = case
        else:
            print(f"WRONG, not timed: {case.name} at {case.length}: error {errors[case.name]:.1e}", flush=True)
    with torch.no_grad():
        results = in_turn(base, {name: case.run for name, case in right.items()}, rounds, times)
    for name, (ms, sdpa_ms, ratio) in results.items():
        length = right[name].length
        bar = BARS.get(name, {}).get(length)
        rows.append(Row(name, length, kernels[name], errors[name], ms, sdpa_ms, ratio, bar))
    return rows


def measure_training(length: int, rounds: int) -> Row:
    """Forward and backward of the gated operator and of SDPA; gradients are checked in tests/ops."""
    q, k, v = (torch.randn(1, length, HEADS, DIM).requires_grad_() for _ in range(3))
    g = (-0.1 * torch.rand(1, length, HEADS)).requires_grad_()
    rows = [torch.randn(1, HEADS, length, DIM).requires_grad_() for _ in range(3)]
    ours = training(lambda: OPERATORS["gla_chunk"].overload(q, k, v, g, scale=DIM**-0.5)[0], [q, k, v, g])
    theirs = training(lambda: F.scaled_dot_product_attention(*rows, is_causal=True), rows)
    ms, sdpa_ms, ratio = in_turn(theirs, {"": ours}, rounds)[""]
    bar = BARS["gla, training"].get(length)
    return Row("gla, training", length, "cpu.gla_stream, recomputed", 0.0, ms, sdpa_ms, ratio, bar)


def merge_share(count: int, merges: int, rounds: int) -> float:
    """Time of `slots_merge` over that of `slots_block`, one block of 32 tokens of a Llama's heads (32 over 8)."""
    block, groups, dim = 32, 8, 128
    q, line = torch.randn(1, block, 4 * groups, dim), torch.randn(1, 2 * block, groups, dim)
    slots = (torch.randn(1, groups, count, dim), torch.randn(1, groups, count, dim), torch.ones(1, groups, count))
    left = (torch.randn(1, block, groups, dim), torch.randn(1, block, groups, dim))
    attend, merge = OPERATORS["slots_block"].overload, OPERATORS["slots_merge"].overload
    with torch.no_grad():
        read = in_turn(
            lambda: attend(q, line, line, *slots, window=block, scale=dim**-0.5),
            {"merge": lambda: merge(*slots, *left, rounds=merges)}, 3 * rounds, 10,
        )  # fmt: skip
    return 1 / read["merge"][2]


def peak_memory(name: str) -> float:
    """Peak bytes beyond the inputs over the bytes of the inputs, at 64k tokens, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_memory, args=(name, sender))
    process.start()
    sender.close()
    share: float = receiver.recv()
    process.join()
    return share


def _memory(name: str, sender: Any) -> None:
    torch.set_num_threads(1)
    with torch.no_grad():
        for length in (256, LONG):
            case = next(case for case in cases(length) if case.name == name)
            Path("/proc/self/clear_refs").write_text("5")  # the peak so far is forgotten
            before = _status("VmRSS")
            case.run()
    size = sum(x.numel() * x.element_size() for x in case.args if isinstance(x, Tensor))
    sender.send((_status("VmHWM") - before) / size)


def _status(field: str) -> int:
    """Bytes that the kernel (Linux) counts of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith(field)))


def ceilings() -> dict[str, float]:
    """Copy bandwidth in GB/s (read and written) and float32 matrix products in GFLOP/s."""
    a, b = torch.randn(64 << 20), torch.empty(64 << 20)
    x = torch.randn(1024, 1024)
    copied, multiplied = (min(timed(call) for _ in range(5)) for call in (lambda: b.copy_(a), lambda: x @ x))
    return {"copy GB/s": round(2 * a.nbytes / copied / 1e6, 1), "matmul GFLOP/s": round(2 * 1024**3 / multiplied / 1e6)}


def machine() -> dict[str, Any]:
    model = ""
    if Path("/proc/cpuinfo").is_file():
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor(),
        "cores": os.cpu_count(),
        "threads used": torch.get_num_threads(),
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


# ---- the report ------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="short lengths, one round, no memory")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--markdown", type=Path, help="also write them as a page of docs/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    rounds = 1 if arguments.quick else 5
    report: dict[str, Any] = {"machine": machine(), "ceilings": ceilings()}
    print(*(f"{key}: {value}" for part in report.values() for key, value in part.items()), sep="\n", flush=True)
    rows: list[Row] = []
    for length in (256, 1024) if arguments.quick else (1024, 4096, 16384):
        rows += measure(list(cases(length)), sdpa(length), max(1, rounds * 4096 // max(length, 4096)))
    rows += measure([step_case(CACHE)], sdpa(CACHE, 1), 3 * rounds, 20)
    rows.append(measure_training(1024 if arguments.quick else 4096, rounds))
    report["rows"] = [asdict(row) for row in rows]
    report["merge over block"] = {
        f"{count} slots merged in {merges}": round(merge_share(count, merges, rounds), 3)
        for count in (64, 128)
        for merges in (1, 4)
    }
    names = () if arguments.quick else ("gla", "delta", "hybrid") if Path("/proc/self/clear_refs").exists() else ()
    report["memory over inputs"] = {name: round(peak_memory(name), 2) for name in names}
    show(report, rows)
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(page(report, rows))


COMMAND = "python benchmarks/bench_kernels_cpu.py --json docs/kernels_cpu.json --markdown docs/kernel-figures.md"
HEADER = ("operator", "tokens", "kernel", "error", "ms", "SDPA ms", "SDPA / ours", "bar")


def cells(row: Row) -> list[str]:
    bar = "" if row.bar is None else f"{row.bar:g}{'' if row.held else ' missed'}"
    error = f"{row.error:.0e}" if row.error else "-"
    ms = [f"{value:.3g}" for value in (row.ms, row.sdpa_ms)]
    return [row.case, f"{row.length:,}", row.kernel, error, *ms, f"{row.ratio:.2f}", bar]


def show(report: dict[str, Any], rows: list[Row]) -> None:
    made = table(*HEADER)
    for row in rows:
        made.add_row(*cells(row))
    Console(width=110).print(made)
    print(*last_lines(report), sep="\n")


def last_lines(report: dict[str, Any]) -> list[str]:
    shares = "; ".join(f"{name}: {share:.0%}" for name, share in report["merge over block"].items())
    memory = ", ".join(f"{name} {times:.1f}" for name, times in report["memory over inputs"].items())
    lines = [f"Merging over the attention (32 query heads over 8 of 128, block 32; bar 25%), by rounds: {shares}."]
    if memory:
        lines.append(f"Peak memory beyond the inputs over the inputs, {LONG:,} tokens (bar {MOST_MEMORY:g}): {memory}.")
    return lines


def page(report: dict[str, Any], rows: list[Row]) -> str:
    described = ", ".join(f"{key} {value}" for part in ("machine", "ceilings") for key, value in report[part].items())
    made = [
        f"| {' | '.join(HEADER)} |",
        f"|{' --- |' * len(HEADER)}",
        *(f"| {' | '.join(cells(row))} |" for row in rows),
    ]
    paragraphs = [
        "# Kernels on a CPU: figures",
        "Written by the run itself: one thread, float32, batch 1, 8 heads of 64; window 64, 128 features, blocks 32.",
        f"```console\n$ {COMMAND}\n```",
        f"{described}.",
        "A ratio above 1 is faster than SDPA: causal over as many tokens; a step, one query over a cache of 8,192.",
        "\n".join(made),
        *last_lines(report),
    ]
    return "\n\n".join(paragraphs) + "\n"


if __name__ == "__main__":
    main()
