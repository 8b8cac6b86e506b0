"""`.pt2`: the lowered graph as a torch.export archive, and with `aoti` compiled ahead of time for this machine's CPU.

`model.pt2` holds standard operators only, batch and length dynamic: `torch.export.load` reads it without this project.
`model.aoti.pt2` is what `torch._inductor.aoti_load_package` and libtorch's AOTIModelPackageLoader run; it is machine
code for one instruction set and one release of torch.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from linearize.errors import ExportError
from linearize.export.interface import Plain, example_inputs
from linearize.export.names import MANIFEST_FILE
from linearize.export.torchscript import TOLERANCE, example
from linearize.ops import decompositions

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel

PT2_FILE, AOTI_FILE = "model.pt2", "model.aoti.pt2"


def write_pt2(compiled: LinearizedModel, folder: Path, aoti: bool) -> None:
    """Write the archive, or both, and a short `linearize.json`; compared with the compiled model.

    Raises:
        ExportError: torch cannot export or compile the graph, or results differ.
    """
    exported = archive(compiled)
    torch.export.save(exported, folder / PT2_FILE)
    differences = {PT2_FILE: check(compiled, torch.export.load(folder / PT2_FILE).module())}
    if aoti:
        _compile(exported, folder / AOTI_FILE)
        differences[AOTI_FILE] = check(compiled, torch._inductor.aoti_load_package(str(folder / AOTI_FILE)))
    names = [name for name in compiled.program.input_names() if name not in compiled.program.state_names]
    manifest = {
        "format": 1,
        "kind": "linearized-pt2",
        "archive": PT2_FILE,
        "compiled": AOTI_FILE if aoti else None,
        "torch": torch.__version__,
        "inputs": names,
        "states": [
            {"name": port.state.name, "shape": list(port.state.shape), "batched": port.state.batched,
             "dtype": str(port.state.dtype).removeprefix("torch."), "init": "zeros", "grows": port.grows}
            for port in Plain(compiled).ports
        ],
        "tokenizer_files": sorted(compiled.files),
        "plan": compiled.plan.model_dump(mode="json"),
        "verified": {"largest_logit_difference": max(differences.values()), "tolerance": TOLERANCE},
    }  # fmt: skip
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))


def archive(compiled: LinearizedModel) -> torch.export.ExportedProgram:
    """torch.export of the lowered graph, our operators decomposed."""
    interface = Plain(compiled)
    inputs, dims = example_inputs(interface)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(interface.module, inputs, dynamic_shapes=tuple(dims))
            return exported.run_decompositions(decompositions())
        except Exception as error:  # torch.export's errors have no common base
            raise ExportError(f"torch.export stopped: {str(error).strip().splitlines()[0]}") from error


def _compile(exported: torch.export.ExportedProgram, path: Path) -> None:
    try:
        with torch.no_grad():
            torch._inductor.aoti_compile_and_package(exported, package_path=str(path))
    except Exception as error:  # inductor's errors have no common base; a missing compiler is one of them
        raise ExportError(f"inductor cannot compile this model ahead of time: {str(error).splitlines()[0]}") from error


def check(compiled: LinearizedModel, loaded: Any) -> float:
    """The largest difference of logits and states, at lengths 1 and 9 and batches 1 and 3 after random tokens.

    Raises:
        ExportError: it is above the tolerance.
    """
    largest = 0.0
    with torch.no_grad():
        for batch, length in ((1, 1), (3, 1), (1, 9), (3, 9)):
            ids = torch.randint(compiled.vocab_size or 2, (batch, 40), generator=torch.Generator().manual_seed(batch))
            _, state = compiled.step(ids)
            inputs = example(compiled, batch, length, state)
            logits, new = compiled.step(inputs[0], state)
            for expected, found in zip((logits, *new.values()), loaded(*inputs), strict=True):
                largest = max(largest, (expected.double() - found.double()).abs().max().item())
    if not largest <= TOLERANCE:
        raise ExportError(
            f"the pt2 program disagrees with PyTorch: largest difference {largest:.3g}; nothing was written"
        )
    return largest
