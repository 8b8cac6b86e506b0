"""`.pte`: the lowered graph for ExecuTorch's runtime on phones and small devices, in one file of two methods.

`step` takes one token, `piece` exactly `prefill_piece` tokens; both take and give what the lowered graph does:
(input_ids, attention_mask[, position_ids], *states) -> (logits, *states), for a batch of one, states zero at the start.
A prompt is fed in whole pieces and the rest token by token. The method `prefill_piece` gives that number. Products and
what stands around them go to XNNPACK, the rest to ExecuTorch's portable operators; both methods read the same weights.

The package `executorch` is not among what the project needs: `pip install "linearize[executorch]"`.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.errors import ArtifactError, ExportError
from linearize.export.names import MANIFEST_FILE
from linearize.export.torchscript import PIECE, TOLERANCE, example
from linearize.ops import decompositions

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel

PTE_FILE = "model.pte"
METHODS = {"step": 1, "piece": PIECE}
PROMPT, GREEDY = PIECE + 3, 20
Run = Callable[..., Sequence[Tensor]]


def write_pte(compiled: LinearizedModel, folder: Path) -> None:
    """`model.pte` and a short `linearize.json`; run by ExecuTorch and compared with the compiled model.

    Raises:
        ExportError: executorch is not installed, a state grows with the context, an operator cannot be lowered, or
            results differ.
        ArtifactError: the file cannot be written.
    """
    growing = [spec.name for spec in compiled.state_specs if spec.grows is not None]
    if growing:
        raise ExportError(f"a .pte has fixed shapes, and {growing[0]} grows with the context; export to onnx or pt2")
    check_installed()
    delegated = _save(compiled, folder / PTE_FILE)
    methods = load_methods(folder / PTE_FILE)
    difference = max(check(compiled, methods[name], length) for name, length in METHODS.items())
    equal = greedy_equal(compiled, methods)
    manifest = {
        "format": 1,
        "kind": "linearized-pte",
        "program": PTE_FILE,
        "methods": METHODS,
        "prefill_piece": PIECE,
        "executorch": version(),
        "torch": torch.__version__,
        "inputs": [name for name in compiled.program.input_names() if name not in compiled.program.state_names],
        "states": [
            {"name": spec.name, "shape": [1, *spec.shape] if spec.batched else list(spec.shape),
             "dtype": str(spec.dtype).removeprefix("torch."), "init": "zeros"}
            for spec in compiled.state_specs
        ],
        "calls_of_xnnpack": delegated,
        "tokenizer_files": sorted(compiled.files),
        "plan": compiled.plan.model_dump(mode="json"),
        "verified": {"largest_difference": difference, "tolerance": TOLERANCE, "greedy_tokens_compared": GREEDY,
                     "greedy_tokens_equal": equal},
    }  # fmt: skip
    (folder / MANIFEST_FILE).write_text(json.dumps(manifest, indent=1))


def check_installed() -> None:
    """Raise `ExportError` where executorch cannot be imported."""
    try:
        with quiet():
            import executorch.exir
            import executorch.runtime  # noqa: F401
    except ImportError as error:
        raise ExportError(
            f'the format pte needs the package executorch: pip install "linearize[executorch]" ({error})'
        ) from error


def version() -> str:
    from importlib.metadata import version as installed

    return installed("executorch")


def _save(compiled: LinearizedModel, path: Path) -> dict[str, int]:
    """Lower both methods and write the file; by method, how many calls of XNNPACK it has."""
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    with torch.no_grad(), quiet():
        try:
            programs = {name: standard(compiled, length) for name, length in METHODS.items()}
            lowered = to_edge_transform_and_lower(
                programs, partitioner=[XnnpackPartitioner()], constant_methods={"prefill_piece": PIECE}
            )
            delegated = {name: _delegates(lowered.exported_program(name)) for name in METHODS}
            program = lowered.to_executorch()
        except Exception as error:  # ExecuTorch's and torch.export's errors have no common base
            raise ExportError(f"ExecuTorch cannot lower this model: {str(error).strip().splitlines()[0]}") from error
    try:
        with path.open("wb") as file:
            program.write_to_file(file)
    except OSError as error:
        raise ArtifactError(f"cannot write {path.name}: {error.strerror or error}") from error
    return delegated


def standard(compiled: LinearizedModel, length: int) -> torch.export.ExportedProgram:
    """The graph for a batch of one and `length` tokens, our operators decomposed."""
    exported = torch.export.export(compiled.graph_module, example(compiled, 1, length))
    return exported.run_decompositions(decompositions())


def _delegates(program: torch.export.ExportedProgram) -> int:
    return sum("executorch_call_delegate" in str(node.target) for node in program.graph.nodes)


def load_methods(path: Path) -> dict[str, Run]:
    """The programs of the file in ExecuTorch's runtime, by name.

    Raises:
        ExportError: it cannot load them: an operator has no kernel there.
    """
    from executorch.runtime import Runtime

    with quiet():
        try:
            program = Runtime.get().load_program(path)
            found = {name: program.load_method(name) for name in METHODS}
        except Exception as error:  # the runtime's errors have no common base
            raise ExportError(f"ExecuTorch cannot load the program that it made: {error}") from error
    return {name: _runner(program, method) for name, method in found.items()}


def _runner(program: Any, method: Any) -> Run:
    """`program` is held, because the method reads from it."""

    def run(*inputs: Tensor) -> Sequence[Tensor]:
        assert program is not None
        try:
            return list(method.execute([tensor.contiguous() for tensor in inputs]))
        except RuntimeError as error:
            raise ExportError(
                f"ExecuTorch cannot run the program that it made: {error}; export to another format, or compile with "
                "other mixers (merged slots are known to fail there)"
            ) from error

    return run


def check(compiled: LinearizedModel, run: Run, length: int) -> float:
    """The largest difference of logits and states from three states that random tokens made.

    Raises:
        ExportError: it is above the tolerance, or a shape or dtype differs.
    """
    largest = 0.0
    with torch.no_grad():
        for seed, seen in enumerate((1, 40, 150)):
            ids = torch.randint(compiled.vocab_size or 2, (1, seen), generator=torch.Generator().manual_seed(seed))
            _, state = compiled.step(ids)
            inputs = example(compiled, 1, length, state)
            logits, new = compiled.step(inputs[0], state)
            for expected, found in zip((logits, *new.values()), run(*inputs), strict=True):
                largest = max(largest, _difference(expected, found, length))
    return largest


def _difference(expected: Tensor, found: Tensor, length: int) -> float:
    """Relative to max(1, the largest entry); see `check`."""
    alike = expected.shape == found.shape and expected.dtype == found.dtype
    scale = max(1.0, expected.double().abs().max().item()) if expected.numel() else 1.0
    difference = (expected.double() - found.double()).abs().max().item() / scale if alike and expected.numel() else 0.0
    if not alike or not difference <= TOLERANCE:
        raise ExportError(
            f"the ExecuTorch program of {length} tokens disagrees with PyTorch: {found.dtype}{list(found.shape)} for "
            f"{expected.dtype}{list(expected.shape)}, largest difference {difference:.3g}, tolerance {TOLERANCE:g}; "
            "nothing was written"
        )
    return difference


def greedy_equal(compiled: LinearizedModel, methods: dict[str, Run]) -> int:
    """Of GREEDY tokens after a prompt of a piece and some single tokens, those that PyTorch chooses as well: each goes
    on from its own states, both are fed PyTorch's tokens."""
    prompt = torch.randint(compiled.vocab_size or 2, (1, PROMPT), generator=torch.Generator().manual_seed(0))
    own, state, equal = [spec.zeros(1) for spec in compiled.state_specs], None, 0
    waiting = [prompt[:, :PIECE], *prompt[:, PIECE:].split(1, dim=1)]
    with torch.no_grad():
        for _ in range(len(waiting) + GREEDY - 1):
            ids = waiting.pop(0)
            tokens = [ids, *example(compiled, 1, ids.shape[1], state)[1 : -len(own)]]
            found, *own = methods["piece" if ids.shape[1] == PIECE else "step"](*tokens, *own)
            logits, state = compiled.step(ids, state)
            if not waiting:
                waiting.append(logits[:, -1:].argmax(dim=-1))
                equal += int(found[0, -1].argmax() == waiting[0])
    return equal


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """ExecuTorch and torchao print and warn of other backends, and of deprecations of their own."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
