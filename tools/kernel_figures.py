"""Compile every configuration of every Triton kernel for sm_80 and sm_90, without a GPU, and check what comes out.

    python tools/kernel_figures.py            compare with tests/kernels/triton/figures.json
    python tools/kernel_figures.py --bless    record the figures of the installed Triton

The real launchers run on meta tensors under a driver that only names a target, so each kernel is specialised as on a
GPU. Registers and stack (spilled registers) are read from the machine code, shared memory from Triton, and the Hopper
matrix instructions are counted. A spill or too much shared memory fails; any other difference must be blessed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from linearize.kernels.triton import _config, _launch, cases

FIGURES = Path(__file__).resolve().parent.parent / "tests" / "kernels" / "triton" / "figures.json"
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Bytes of shared memory that one program may use. What sm_80 runs untuned must also fit sm_86 and sm_89.
SHARED = {80: 166912, 90: 232448}
SHARED_EVERYWHERE = 101376
Figure = dict[str, int]


class Named:
    """A driver that only says for which target to compile."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.arch, 32)


@contextmanager
def compiling_for(arch: int, compiled: Callable[..., None]) -> Iterator[None]:
    """Within it, launching a kernel compiles it for `arch` in every configuration and hands it to `compiled`."""

    def launch(
        kernel: Any, grid: Any, args: Sequence[Any], constants: dict[str, Any], configs: Sequence[_config.Config]
    ) -> None:
        for number, config in enumerate(configs):
            built = kernel.warmup(*args, grid=grid(config), **_launch.options(constants, config))
            compiled(kernel.fn.__name__, number, config, built)

    driver.set_active(Named(arch))
    with patch.object(_launch, "launch", launch), patch.object(_config, "ASSUMED", [arch]):
        yield


def figures_of(built: Any) -> Figure:
    """Registers a thread, bytes of stack and of shared memory, Hopper matrix instructions."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = {name: int(value) for name, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "shared": built.metadata.shared,
        "wgmma": built.asm["ptx"].count("wgmma.mma_async"),
    }


def measure(only: str = "") -> dict[str, Figure]:
    """The figures of every kernel, case and configuration by a readable name."""
    found: dict[str, Figure] = {}
    for arch, case in itertools.product(SHARED, cases.CASES):

        def compiled(
            kernel: str, number: int, config: _config.Config, built: Any, arch: int = arch, case: str = case
        ) -> None:
            found[f"sm_{arch} {kernel} {case} #{number} {config}"] = figures_of(built)

        if only in case:
            with compiling_for(arch, compiled):
                cases.CASES[case](torch.device("meta"))
    return found


def problems(found: dict[str, Figure], recorded: dict[str, Figure] | None) -> list[str]:
    """What is wrong with the figures, one readable line each; `recorded` is None for a Triton never measured."""
    lines = []
    for name, figure in found.items():
        limit = SHARED[int(name[3:5])]
        if name.startswith("sm_80") and "#0" in name:
            limit = SHARED_EVERYWHERE
        if figure["stack"]:
            lines.append(f"{name}: spills, {figure['stack']} bytes of stack")
        if figure["shared"] > limit:
            lines.append(f"{name}: {figure['shared']} bytes of shared memory, over {limit}")
        if recorded is not None and recorded.get(name) != figure:
            lines.append(f"{name}: {figure}, recorded {recorded.get(name)}; if meant, run kernel_figures.py --bless")
    gone = sorted(set(recorded or {}) - set(found))
    return lines + [f"{name}: recorded, but no longer compiled" for name in gone]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bless", action="store_true", help="record the figures of the installed Triton")
    parser.add_argument("--only", default="", help="cases whose name contains this; nothing is recorded or found gone")
    options = parser.parse_args(arguments)
    if triton.knobs.runtime.interpret:
        parser.error("TRITON_INTERPRET is set: there is nothing to compile")
    table = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
    found = measure(options.only)
    if options.only:
        for name, figure in found.items():
            print(name, figure)
    if options.bless and not options.only:
        table[triton.__version__] = found
        FIGURES.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n")
    wrong = problems(found, None if options.only else table.get(triton.__version__))
    print(*wrong, sep="\n", end="\n" if wrong else "")
    print(f"triton {triton.__version__}: {len(found)} compiled, {len(wrong)} problems")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
