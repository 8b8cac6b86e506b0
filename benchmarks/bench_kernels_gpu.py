"""Triton kernels on a GPU against PyTorch's flash attention and flash-linear-attention, as ratios within one process.

    python benchmarks/bench_kernels_gpu.py --json docs/kernels_gpu.json      # what `make gpu` runs
    python benchmarks/bench_kernels_gpu.py --only gla --quick

The machine's own ceilings come first: copy bandwidth and the rate of bfloat16 matrix products. Each row is checked
against standard operators in float64 before it is timed, and is not timed where it is wrong. Times are medians with a
cold L2 cache; a step's bytes are those of its states, rings and cache.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import linearize.kernels  # noqa: F401  (puts the kernels in use)
from linearize.ops import OPERATORS
from linearize.printing import table

Call = Callable[[], Any]
Timer = Callable[[Call], float]
TOLERANCE = 3e-2  # of the largest value, bfloat16
TOKENS = 32768  # in a batch, whatever the length
BARS = {"sdpa 8192": 2.0, "sdpa 32768": 8.0, "step": 0.8, "mla": 0.7, "fla": 1.0, "fla short": 1.5, "train": 3.0}


@dataclass
class Case:
    """One measurement: ours, what it must equal, and whom it is compared with."""

    name: str
    ours: Call
    truth: Call | None
    peers: dict[str, Call] = field(default_factory=dict)
    bars: dict[str, float] = field(default_factory=dict)
    bytes: int = 0


@dataclass
class Row:
    """Times in ms, ratios peer / ours, and the share of the copy bandwidth; `wrong` says why nothing was timed."""

    name: str
    error: float
    ms: float = 0.0
    ratios: dict[str, float] = field(default_factory=dict)
    bandwidth: float = 0.0
    missed: list[str] = field(default_factory=list)
    wrong: str = ""


# ---- what is measured ------------------------------------------------------------------------------------------------


def normal(*shape: int, device: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal SDPA of [B,T,H,d], on the flash backend and no other."""
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def wide(args: tuple[Any, ...]) -> list[Any]:
    return [x.double() if isinstance(x, Tensor) and x.is_floating_point() else x for x in args]


def gla_cases(device: str, lengths: tuple[int, ...], tokens: int, heads: int = 16) -> Iterator[Case]:
    for dim in (64, 128):
        for length in lengths:
            batch = max(1, tokens // length)
            q, k, v = (normal(batch, length, heads, dim, device=device) for _ in range(3))
            g, scale = -0.1 * torch.rand(batch, length, heads, device=device), dim**-0.5
            peers, bars = {"sdpa": lambda q=q, k=k, v=v: flash(q, k, v)}, {}
            if (other := fla_simple_gla()) is not None:
                peers["fla"] = lambda q=q, k=k, v=v, g=g, scale=scale, other=other: other(q, k, v, g=g, scale=scale)
                bars["fla"] = BARS["fla short" if length <= 1024 else "fla"]
            what = f"forward d={dim} T={length} B={batch}"
            yield case("gla_chunk", what, (q, k, v, g), {"scale": scale}, peers, bars)


def train_cases(device: str, length: int, heads: int = 16, dim: int = 64, window: int = 64) -> Iterator[Case]:
    """Forward and backward of every chunked operator, against flash attention's over as many tokens."""
    q, k, v = (normal(1, length, heads, dim, device=device).requires_grad_() for _ in range(3))
    by_channel = -0.1 * torch.rand(1, length, heads, dim, device=device)
    g, beta = by_channel[..., 0], -10 * by_channel[..., 1]
    line_k, line_v = (torch.cat([x.detach()[:, :window], x.detach()], 1).requires_grad_() for x in (k, v))
    fq, fk = (normal(1, length, heads, 2 * dim, device=device).abs().requires_grad_() for _ in range(2))
    mask = torch.arange(length + window, device=device)[None] >= window
    keywords = {"scale": dim**-0.5}
    calls = {
        "gla_chunk": ((q, k, v, g), keywords),
        "gla_vec_chunk": ((q, k, v, by_channel), keywords),
        "delta_chunk": ((q, k, v, beta, g), keywords | {"l2norm": True}),
        "hybrid_chunk": ((q, line_k, line_v, mask, fq, fk), keywords | {"window": window}),
    }

    def step(forward: Callable[[], Tensor], wanted: tuple[Tensor, ...]) -> Tensor:
        o = forward()
        return torch.autograd.grad(o, wanted, torch.ones_like(o))[0]

    for name, (args, kept) in calls.items():
        op, wanted = OPERATORS[name].overload, tuple(x for x in args if x.requires_grad)
        ours = lambda op=op, args=args, kept=kept, wanted=wanted: step(lambda: op(*args, **kept)[0], wanted)  # noqa: E731
        peers = {"sdpa": lambda: step(lambda: flash(q, k, v), (q, k, v))}
        bars = {"sdpa": BARS["train"]} if name == "gla_chunk" else {}
        yield Case(f"{name} forward + backward d={dim} T={length}", ours, None, peers, bars)


def hybrid_cases(device: str, lengths: tuple[int, ...], heads: int = 32, kv_heads: int = 8) -> Iterator[Case]:
    dim, features, window = 128, 128, 64
    for length in lengths:
        q, (k, v) = normal(1, length, heads, dim, device=device), (
            normal(1, length + window, kv_heads, dim, device=device) for _ in range(2)
        )
        fq, fk = (normal(1, length, h, features, device=device).abs() for h in (heads, kv_heads))
        mask = torch.arange(length + window, device=device)[None] >= window
        near_k, near_v = k[:, window:], v[:, window:]
        peers = {"sdpa": lambda q=q, k=near_k, v=near_v: flash(q, k, v)}
        bars = {"sdpa": BARS[f"sdpa {length}"]} if f"sdpa {length}" in BARS else {}
        keywords = {"window": window, "scale": dim**-0.5}
        yield case("hybrid_chunk", f"forward w=64 F=128 T={length}", (q, k, v, mask, fq, fk), keywords, peers, bars)


def step_cases(device: str, batches: tuple[int, ...], heads: int = 32, kv_heads: int = 8) -> Iterator[Case]:
    dim, features, window = 128, 128, 64
    for batch in batches:
        q, k, v = (normal(batch, 1, h, dim, device=device) for h in (heads, kv_heads, kv_heads))
        g, s = -torch.rand(batch, 1, kv_heads, device=device), torch.zeros(batch, kv_heads, dim, dim, device=device)
        bars = {"copy": BARS["step"]} if batch >= 64 else {}
        by_channel, beta = -torch.rand(batch, 1, kv_heads, dim, device=device), torch.ones_like(g)
        steps = {"gla_step": (g,), "gla_vec_step": (by_channel,), "delta_step": (beta, g)}
        for name, more in steps.items():
            op, reference = OPERATORS[name].overload, OPERATORS[name].reference
            keywords = {"scale": 0.1} | ({"l2norm": True} if name == "delta_step" else {})
            yield Case(
                f"{name} B={batch}",
                lambda op=op, x=(q, k, v, *more, s), kw=keywords: op(*x, **kw),
                lambda op=reference, x=(q, k, v, *more, s), kw=keywords: op(*wide(x), **kw),
                bars=bars,
                bytes=2 * s.nbytes,
            )
        fq, fk = (normal(batch, 1, h, features, device=device).abs() for h in (heads, kv_heads))
        pos = torch.full((batch,), 1000 * window + 17, device=device)
        rings = [normal(batch, 2 * window, kv_heads, size, device=device).abs() for size in (dim, dim, features)]
        z = torch.ones(batch, kv_heads, features, device=device)
        args, keywords = (q, k, v, fq, fk, pos, *rings, s + 1, z), {"window": window, "scale": 0.1}
        op, reference = OPERATORS["hybrid_step"].overload, OPERATORS["hybrid_step"].reference
        read = window * kv_heads * batch * 2 * 2 * dim + 18 * kv_heads * batch * 2 * (dim + features)
        yield Case(
            f"hybrid_step w=64 F=128 B={batch}",
            lambda op=op, x=args, kw=keywords: op(*x, **kw),
            lambda op=reference, x=args, kw=keywords: op(*wide(x), **kw),
            bars=bars,
            bytes=s.nbytes + z.nbytes + read,
        )


def mla_cases(device: str, length: int, batches: tuple[int, ...], heads: int = 32) -> Iterator[Case]:
    for batch in batches:
        q, cache = normal(batch, heads, 576, device=device), normal(batch, length, 576, device=device)
        lens = torch.full((batch,), length, device=device)
        bars = {"copy": BARS["mla"]} if batch >= 16 else {}
        made = case("mla_decode", f"L={length} B={batch}", (q, cache, lens), {"rank": 512, "scale": 0.04}, {}, bars)
        made.bytes = cache.nbytes
        yield made


def slots_cases(device: str, blocks: int, heads: int = 32, kv_heads: int = 8) -> Iterator[Case]:
    window, count, dim = 64, 256, 128
    q = normal(blocks, window, heads, dim, device=device)
    k, v = (normal(blocks, 2 * window, kv_heads, dim, device=device) for _ in range(2))
    slot_k, slot_v = (normal(blocks, kv_heads, count, dim, device=device) for _ in range(2))
    n = torch.randint(0, 9, (blocks, kv_heads, count), device=device).float()
    keywords = {"window": window, "scale": dim**-0.5}
    yield case("slots_block", f"w=64 C=256 blocks={blocks}", (q, k, v, slot_k, slot_v, n), keywords, {}, {})


def case(
    op: str,
    what: str,
    args: tuple[Any, ...],
    keywords: dict[str, Any],
    peers: dict[str, Call],
    bars: dict[str, float],
) -> Case:
    operator = OPERATORS[op]
    ours, truth = (
        (lambda: operator.overload(*args, **keywords)),
        (lambda: operator.streamed(*wide(args), **keywords)),
    )
    return Case(f"{op} {what}", ours, truth, peers, bars)


def fla_simple_gla() -> Callable[..., Any] | None:
    """flash-linear-attention's kernel of the same function, where it is installed."""
    if importlib.util.find_spec("fla") is None:
        return None
    from fla.ops.simple_gla import chunk_simple_gla

    return chunk_simple_gla


# ---- measuring -------------------------------------------------------------------------------------------------------


def median_ms(call: Call) -> float:
    from triton.testing import do_bench

    return float(do_bench(call, warmup=50, rep=200, return_mode="median"))


def ceilings(device: str, timer: Timer, size: int) -> dict[str, float]:
    """GB/s of a copy, read and written, and TFLOP/s of a product of bfloat16 matrices."""
    source = torch.empty(size * size * 16, dtype=torch.uint8, device=device)
    target, a = torch.empty_like(source), normal(size, size, device=device)
    copy, product = timer(lambda: target.copy_(source)), timer(lambda: a @ a)
    return {"copy GB/s": 2 * source.nbytes / copy / 1e6, "matmul TFLOP/s": 2 * size**3 / product / 1e9}


def error_of(made: Case) -> float:
    """Largest difference relative to the largest value, over all outputs; the truth is computed first, since a step
    changes its arguments."""
    if made.truth is None:
        return 0.0
    expected, found = made.truth(), made.ours()
    pairs = zip(*((x if isinstance(x, tuple) else (x,)) for x in (found, expected)), strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max().clamp(min=1.0)).item() for a, b in pairs if a.numel())


def measure(made: Case, timer: Timer, copy: float) -> Row:
    row = Row(made.name, error_of(made))
    if not row.error < TOLERANCE:
        row.wrong = f"differs from float64 by {row.error:.1e} of its largest value"
        return row
    row.ms = timer(made.ours)
    row.ratios = {name: timer(peer) / row.ms for name, peer in made.peers.items()}
    if made.bytes:
        row.bandwidth = made.bytes / row.ms / 1e6 / copy
    reached = row.ratios | {"copy": row.bandwidth}
    row.missed = [f"{name} {reached[name]:.2f} of {bar}" for name, bar in made.bars.items() if reached[name] < bar]
    return row


def all_cases(device: str, quick: bool) -> Iterator[Case]:
    yield from gla_cases(device, (512, 2048) if quick else (512, 1024, 2048, 8192, 32768), TOKENS)
    yield from train_cases(device, 8192)
    yield from hybrid_cases(device, (8192,) if quick else (8192, 32768))
    yield from step_cases(device, (1, 64) if quick else (1, 16, 64, 256))
    yield from mla_cases(device, 32768, (16,) if quick else (1, 16, 64))
    yield from slots_cases(device, 64)


def machine() -> dict[str, str]:
    gpu = torch.cuda.get_device_properties(0)
    found = {"gpu": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory": f"{gpu.total_memory >> 30} GiB"}
    versions = {"torch": torch.__version__, "cuda": str(torch.version.cuda), "python": platform.python_version()}
    return found | versions | {name: version(name) for name in ("triton", "fla")}


def version(module: str) -> str:
    if importlib.util.find_spec(module) is None:
        return "not installed"
    return str(getattr(importlib.import_module(module), "__version__", "unknown"))


def shown(rows: list[Row]) -> Any:
    made = table("kernel", "error", "ms", "SDPA / ours", "fla / ours", "of copy", "", right=("error", "ms"))
    for row in rows:
        ratios = [f"{row.ratios[name]:.2f}" if name in row.ratios else "" for name in ("sdpa", "fla")]
        share = f"{row.bandwidth:.0%}" if row.bandwidth else ""
        made.add_row(row.name, f"{row.error:.1e}", f"{row.ms:.3f}", *ratios, share, row.wrong or "; ".join(row.missed))
    return made


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer lengths and batches")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    arguments, _ = parser.parse_known_args()
    if not torch.cuda.is_available():
        print("bench_kernels_gpu: torch finds no GPU, so nothing is measured")
        return 0
    torch.manual_seed(0)
    console, found = Console(width=160), {"machine": machine(), "ceilings": ceilings("cuda", median_ms, 8192)}
    console.print(found["machine"], found["ceilings"])
    copy, rows = found["ceilings"]["copy GB/s"], []
    for made in all_cases("cuda", arguments.quick):
        if arguments.only in made.name:
            rows.append(measure(made, median_ms, copy))
    console.print(shown(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps({**found, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 1 if any(row.wrong for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
