"""What one quantised product costs beside float32, and what is the most that a whole step can gain from it.

    python benchmarks/bench_products.py                                  # natively
    python benchmarks/bench_products.py --web NODE_FOLDER                # and in WebAssembly, under node
    python benchmarks/bench_products.py --part web --web NODE_FOLDER     # there alone

Products: microseconds of CPU for x [1,T,K] W [K,N] by operator, several with weights of their own in one session, less
an empty session's run. Body: the embedded model without any mixer (embedding, norms, products, activations), float32
over 8 bits: no choice of mixer can gain more than that from fewer bits. Least of the rounds, which all graphs take in
turns; one thread.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from linearize.export.blocks import quantize_columns

Sizes = tuple[tuple[int, int], ...]
CONTRIB = "com.microsoft"
NATIVE: Sizes = ((192, 320), (192, 1024), (512, 192), (384, 1024), (1024, 2816))
WEB: Sizes = ((192, 512), (384, 1024), (1024, 4096))
LENGTHS = (1, 8, 32)
SCRIPT = Path(__file__).parent / "_web_runs.mjs"


class Graph:
    """Nodes and constants under names of their own."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []

    def constant(self, array: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(array), name))
        return name

    def add(self, kind: str, inputs: list[str], count: int = 1, **attributes: Any) -> list[str]:
        names = [f"n{len(self.nodes)}_{place}" for place in range(count)]
        self.nodes.append(helper.make_node(kind, inputs, names, **attributes))
        return names

    def model(self, inputs: dict[str, tuple[int, list[int]]], outputs: list[str]) -> bytes:
        given = [helper.make_tensor_value_info(name, kind, shape) for name, (kind, shape) in inputs.items()]
        made = [onnx.ValueInfoProto(name=name) for name in outputs]
        graph = helper.make_graph(self.nodes, "g", given, made, self.constants)
        opsets = [helper.make_opsetid("", 23), helper.make_opsetid(CONTRIB, 1)]
        data: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
        return data


def weight(inner: int, outer: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(inner, outer)).astype(np.float32) / np.float32(np.sqrt(inner))


def float32(graph: Graph, x: str, w: np.ndarray) -> str:
    return graph.add("MatMul", [x, graph.constant(w)])[0]


def blocks(bits: int, block: int) -> Callable[[Graph, str, np.ndarray], str]:
    """MatMulNBits, accuracy_level 4, symmetric."""

    def product(graph: Graph, x: str, w: np.ndarray) -> str:
        inner, outer = w.shape
        rows = np.zeros((outer, -(-inner // block) * block), np.float32)
        rows[:, :inner] = w.T
        cut = rows.reshape(outer, -1, block)
        scales = np.abs(cut).max(axis=-1) / (2 ** (bits - 1) - 1)
        q = (np.rint(cut / scales[..., None]) + 2 ** (bits - 1)).astype(np.uint8)
        q = q if bits == 8 else q[..., 0::2] | (q[..., 1::2] << 4)
        attributes = {"K": inner, "N": outer, "bits": bits, "block_size": block, "accuracy_level": 4}
        inputs = [x, graph.constant(q), graph.constant(scales.astype(np.float32))]
        return graph.add("MatMulNBits", inputs, domain=CONTRIB, **attributes)[0]

    return product


def dynamic(graph: Graph, x: str, w: np.ndarray) -> str:
    """What `web` writes, which onnxruntime joins to DynamicQuantizeMatMul."""
    q, scales = quantize_columns(w)
    small, scale, zero = graph.add("DynamicQuantizeLinear", [x], 3)
    middle = graph.constant(np.array(128, np.uint8))
    whole = graph.add("MatMulInteger", [small, graph.constant(q), zero, middle])
    real = graph.add("Cast", whole, to=TensorProto.FLOAT)
    both = graph.add("Mul", [scale, graph.constant(scales)])
    return graph.add("Mul", [real[0], both[0]])[0]


def turned(graph: Graph, x: str, w: np.ndarray) -> str:
    """The weight as the left side, [N,K] [K,1]: for one token only."""
    q, scales = quantize_columns(w)
    small, scale, zero = graph.add("DynamicQuantizeLinear", [x], 3)
    column = graph.add("Reshape", [small, graph.constant(np.array([w.shape[0], -1]))])
    middle = graph.constant(np.array(128, np.uint8))
    whole = graph.add("MatMulInteger", [graph.constant(q.T), column[0], middle, zero])
    real = graph.add("Cast", whole, to=TensorProto.FLOAT)
    both = graph.add("Mul", [scale, graph.constant(scales[:, None])])
    return graph.add("Mul", [real[0], both[0]])[0]


def convolution(graph: Graph, x: str, w: np.ndarray) -> str:
    """ConvInteger with taps of one, tokens along the line: for one token only."""
    q, scales = quantize_columns(w)
    small, scale, zero = graph.add("DynamicQuantizeLinear", [x], 3)
    column = graph.add("Reshape", [small, graph.constant(np.array([1, w.shape[0], -1]))])
    middle = graph.constant(np.array(128, np.uint8))
    whole = graph.add("ConvInteger", [column[0], graph.constant(q.T[:, :, None]), zero, middle])
    real = graph.add("Cast", whole, to=TensorProto.FLOAT)
    both = graph.add("Mul", [scale, graph.constant(scales[:, None])])
    return graph.add("Mul", [real[0], both[0]])[0]


def general(graph: Graph, x: str, w: np.ndarray) -> str:
    """QGemm, which gives float32 where it is told no scale for its output."""
    q, scales = quantize_columns(w)
    small, scale, zero = graph.add("DynamicQuantizeLinear", [x], 3)
    flat = graph.add("Reshape", [small, graph.constant(np.array([-1, w.shape[0]]))])
    zeros = graph.constant(np.full(w.shape[1], 128, np.uint8))
    inputs = [flat[0], scale, zero, graph.constant(q), graph.constant(scales), zeros]
    return graph.add("QGemm", inputs, domain=CONTRIB)[0]


KINDS: dict[str, Callable[[Graph, str, np.ndarray], str]] = {
    "float32": float32,
    "8 bits, blocks of 32": blocks(8, 32),
    "8 bits, blocks of 64": blocks(8, 64),
    "8 bits, blocks of 128": blocks(8, 128),
    "4 bits, blocks of 32": blocks(4, 32),
    "dynamic 8 bits": dynamic,
}
ONE_TOKEN = {"MatMulInteger, weight on the left": turned, "ConvInteger": convolution}
WEB_KINDS = {**KINDS, "QGemm": general} | ONE_TOKEN
NOTHING = "an empty run"


def products(kind: str, size: tuple[int, int], length: int, count: int) -> bytes:
    """`count` products of one x, with a maximum of each as the output."""
    graph, found = Graph(), []
    for seed in range(count if kind != NOTHING else 0):
        y = WEB_KINDS[kind](graph, "x", weight(*size, seed))
        found += graph.add("ReduceMax", [y], keepdims=0)
    found = found or graph.add("ReduceMax", ["x"], keepdims=0)
    return graph.model({"x": (TensorProto.FLOAT, [1, length, size[0]])}, found)


def body(kind: str) -> bytes:
    """The embedded model's 4 layers of width 192 (6 and 2 heads of 32, 512 hidden, 1,024 tokens) without mixers."""
    graph, product = Graph(), KINDS[kind]
    gain = graph.constant(np.ones(192, np.float32))
    x = graph.add("Gather", [graph.constant(weight(1024, 192, 9)), "ids"])[0]
    seen = graph.add("RMSNormalization", [x, gain], axis=-1)[0]

    def skip(x: str, y: str) -> tuple[str, str]:
        name = graph.add("SkipSimplifiedLayerNormalization", [x, y, gain], 4, domain=CONTRIB)
        graph.nodes[-1].output[1] = graph.nodes[-1].output[2] = ""
        return name[3], name[0]

    for layer in range(4):
        sizes = graph.constant(np.array([192, 64, 64]))
        q = graph.add("Split", [product(graph, seen, weight(192, 320, layer)), sizes], 3, axis=-1)[0]
        x, seen = skip(x, product(graph, q, weight(192, 192, layer)))
        halves = graph.constant(np.array([512, 512]))
        gate, up = graph.add("Split", [product(graph, seen, weight(192, 1024, layer)), halves], 2, axis=-1)
        open_ = graph.add("QuickGelu", [gate], domain=CONTRIB, alpha=1.0)[0]
        inner = graph.add("Mul", [open_, up])[0]
        x, seen = skip(x, product(graph, inner, weight(512, 192, layer)))
    return graph.model({"ids": (TensorProto.INT64, [1, 1])}, [product(graph, seen, weight(192, 1024, 5))])


def native_times(models: dict[str, bytes], rounds: int) -> dict[str, float]:
    """Microseconds of CPU a run, by name."""
    runs = {name: _native_run(data) for name, data in models.items()}
    best = dict.fromkeys(runs, 1e12)
    for place in range(rounds):
        for name, run in runs.items():
            repeats = 2 if place == 0 else max(2, min(60, int(30_000 / best[name])))
            started = time.process_time()
            for _ in range(repeats):
                run()
            best[name] = min(best[name], 1e6 * (time.process_time() - started) / repeats)
    return best


def _native_run(data: bytes) -> Callable[[], Any]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    value, binding = onnxruntime.OrtValue.ortvalue_from_numpy, session.io_binding()
    feeds = {entry.name: _filled(entry) for entry in session.get_inputs()}
    for name, array in feeds.items():
        binding.bind_ortvalue_input(name, value(array))
    for entry, array in zip(session.get_outputs(), session.run(None, feeds), strict=True):
        binding.bind_ortvalue_output(entry.name, value(array))
    return lambda: session.run_with_iobinding(binding)


def _filled(entry: Any) -> np.ndarray:
    if entry.type == "tensor(int64)":
        return np.ones(entry.shape, np.int64)
    return np.random.default_rng(0).normal(size=entry.shape).astype(np.float32)


def web_times(models: dict[str, bytes], rounds: int, node: Path) -> dict[str, float]:
    """The same in WebAssembly, under node."""
    with tempfile.TemporaryDirectory() as place:
        for number, data in enumerate(models.values()):
            (Path(place) / f"{number}.onnx").write_bytes(data)
        command = ["node", str(SCRIPT), str(node), str(rounds), place, str(len(models))]
        done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"bench_products: {SCRIPT.name} failed:\n{done.stderr[-2000:]}")
    return dict(zip(models, json.loads(done.stdout), strict=True))


def measure(times: Callable[[dict[str, bytes]], dict[str, float]], sizes: Sizes, kinds: list[str]) -> dict[str, Any]:
    """Microseconds of one product by size and length, of every kind."""
    found: dict[str, Any] = {}
    for size in sizes:
        count = max(2, min(12, 80_000_000 // (size[0] * size[1] * 4)))  # large ones do not fit in a cache together
        for length in LENGTHS:
            able = [kind for kind in kinds if length == 1 or kind not in ONE_TOKEN]
            models = {kind: products(kind, size, length, count) for kind in (NOTHING, *able)}
            microseconds = times(models)
            empty = microseconds.pop(NOTHING)
            row = {kind: (each - empty) / count for kind, each in microseconds.items()}
            found[f"{size[0]} x {size[1]}, {length} tokens"] = row
    return found


def show(title: str, rows: dict[str, dict[str, float]]) -> None:
    kinds = list(dict.fromkeys(kind for row in rows.values() for kind in row))
    print(f"\n| {title} | {' | '.join(kinds)} |\n|---|{'---|' * len(kinds)}")
    for name, row in rows.items():
        print(f"| {name} | {' | '.join(f'{row[kind]:.1f}' if kind in row else '' for kind in kinds)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer rounds and sizes")
    parser.add_argument("--json", type=Path, help="also write the figures to this file")
    parser.add_argument("--part", choices=("native", "web"), help="one of both")
    parser.add_argument("--web", type=Path, metavar="NODE_FOLDER", help="a folder with onnxruntime-web from npm")
    arguments = parser.parse_args()
    rounds, some = (3, slice(0, 2)) if arguments.quick else (8, slice(None))
    figures: dict[str, Any] = {}
    if arguments.part != "web":
        bodies = native_times({kind: body(kind) for kind in KINDS}, 2 * rounds)
        figures["body without mixers"] = bodies
        show("microseconds a step, no mixers", {"embedded model": bodies})
        figures["native"] = measure(lambda models: native_times(models, rounds), NATIVE[some], list(KINDS))
        show("microseconds a product, native", figures["native"])
    if arguments.web and arguments.part != "native":
        node = arguments.web
        figures["web"] = measure(lambda models: web_times(models, rounds, node), WEB[some], list(WEB_KINDS))
        show("microseconds a product, WebAssembly", figures["web"])
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
