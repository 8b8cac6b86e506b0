"""TorchScript: the one step traced at two lengths, for libtorch and for Python without this project.

`step.pt` takes one token, `piece.pt` exactly `prefill_piece` tokens; both take and give what the lowered graph does:
(input_ids, attention_mask[, position_ids], *states) -> (logits, *states), for a batch of one: a trace holds sizes as
constants. `states.pt` gives the states before the first token. A prompt is fed in whole pieces and the rest token by
token. TorchScript is deprecated upstream (torch.jit warns of it): for new work take ONNX or pt2.
"""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx, nn

from linearize.errors import ExportError
from linearize.export.names import MANIFEST_FILE
from linearize.export.ways import TORCHSCRIPT
from linearize.ops import decompositions
from linearize.program import POSITIONS

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel
    from linearize.runtime.state import State

PIECE = 64
STEP_FILE, PIECE_FILE, STATES_FILE = "step.pt", "piece.pt", "states.pt"
TOLERANCE = 1e-4


class Standard(fx.Interpreter):
    """The lowered graph with our operators in standard ones, which is what a trace then records."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.table = decompositions()

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return super().call_function(self.table.get(target, target), args, kwargs)


class Step(nn.Module):
    """The graph as a module that can be traced; outputs are a flat tuple."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__()
        self.inner = module

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        return tuple(Standard(self.inner).run(*inputs))


class Start(nn.Module):
    """What a program without JSON must know: `piece`, whether positions are fed, and the states before any token."""

    def __init__(self, piece: int, positions: bool, states: list[Tensor]) -> None:
        super().__init__()
        self.piece, self.positions = piece, positions
        self.states = torch.jit.Attribute(states, list[Tensor])

    def forward(self) -> list[Tensor]:
        return self.states  # type: ignore[return-value]


def write_torchscript(compiled: LinearizedModel, folder: Path) -> None:
    """`step.pt`, `piece.pt`, `states.pt` and a short `linearize.json`; compared with the compiled model.

    Raises:
        ExportError: a state grows with the context, the trace fails, or its results differ.
    """
    growing = TORCHSCRIPT.growing(compiled.state_specs)
    if growing is not None:
        raise ExportError(f"{growing}; export to onnx or pt2")
    differences = {}
    for name, length in ((STEP_FILE, 1), (PIECE_FILE, PIECE)):
        traced = trace(compiled, length)
        _save(traced, folder / name)
        differences[name] = check(compiled, torch.jit.load(str(folder / name)), length)
    positions = POSITIONS in compiled.program.input_names()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = torch.jit.script(Start(PIECE, positions, [spec.zeros(1) for spec in compiled.state_specs]))
    _save(start, folder / STATES_FILE)
    manifest = {
        "format": 1,
        "kind": "linearized-torchscript",
        "step": STEP_FILE,
        "piece": PIECE_FILE,
        "start": STATES_FILE,
        "prefill_piece": PIECE,
        "inputs": [name for name in compiled.program.input_names() if name not in compiled.program.state_names],
        "states": [
            {"name": spec.name, "shape": [1, *spec.shape] if spec.batched else list(spec.shape),
             "dtype": str(spec.dtype).removeprefix("torch."), "init": "zeros"}
            for spec in compiled.state_specs
        ],
        "tokenizer_files": sorted(compiled.files),
        "plan": compiled.plan.model_dump(mode="json"),
        "verified": {"largest_logit_difference": max(differences.values()), "tolerance": TOLERANCE},
    }  # fmt: skip
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))


def _save(program: torch.jit.ScriptModule, path: Path) -> None:
    """Through memory: writing to a full disk, torch.jit.save ends the process instead of raising."""
    buffer = io.BytesIO()
    torch.jit.save(program, buffer)
    path.write_bytes(buffer.getbuffer())


def trace(compiled: LinearizedModel, length: int) -> torch.jit.ScriptModule:
    inputs = example(compiled, 1, length)
    module = Step(compiled.graph_module).eval()
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the deprecation, which this module's text repeats, and sizes taken as constants
        try:
            traced = torch.jit.trace(module, inputs, check_trace=False)
            return torch.jit.freeze(traced.eval())
        except Exception as error:  # torch.jit's errors have no common base
            raise ExportError(f"torch.jit.trace stopped: {str(error).strip().splitlines()[0]}") from error


def example(compiled: LinearizedModel, batch: int, length: int, state: State | None = None) -> tuple[Tensor, ...]:
    """Inputs of the graph: random tokens after `state`, or after none."""
    generator = torch.Generator().manual_seed(length)
    ids = torch.randint(compiled.vocab_size or 2, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    states = [spec.zeros(batch) for spec in compiled.state_specs] if state is None else list(state.values())
    seen = states[[spec.name for spec in compiled.state_specs].index("seen")]
    positions = [seen[:, None] + torch.arange(length)] if POSITIONS in compiled.program.input_names() else []
    return (ids, mask, *positions, *states)


def check(compiled: LinearizedModel, loaded: torch.jit.ScriptModule, length: int) -> float:
    """The largest difference of logits and states from three states that random tokens made.

    Raises:
        ExportError: it is above the tolerance.
    """
    largest = 0.0
    with torch.no_grad():
        for seed, seen in enumerate((1, 40, 150)):
            ids = torch.randint(compiled.vocab_size or 2, (1, seen), generator=torch.Generator().manual_seed(seed))
            _, state = compiled.step(ids)
            inputs = example(compiled, 1, length, state)
            logits, new = compiled.step(inputs[0], state)
            for expected, found in zip((logits, *new.values()), loaded(*inputs), strict=True):
                largest = max(largest, (expected.double() - found.double()).abs().max().item())
    if not largest <= TOLERANCE:
        raise ExportError(
            f"the TorchScript program of {length} tokens disagrees with PyTorch: largest difference {largest:.3g}, "
            f"tolerance {TOLERANCE:g}; nothing was written"
        )
    return largest
