"""Capture of a model that stays on disk: structure on the meta device, values read from its safetensors files.

The source's own code is run too, to compare: each module gets its weights before it runs and loses them afterwards.
"""

from __future__ import annotations

import gc
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.experimental import proxy_tensor

from linearize.capture import hf
from linearize.capture.calling import find_logits
from linearize.capture.checks import TOLERANCE
from linearize.capture.probing import first_line, probe_inputs, relative_difference
from linearize.capture.torch_export import capture_graph
from linearize.errors import ArtifactError, CaptureError
from linearize.program import MASK, POSITIONS, TOKENS, Program
from linearize.rewriting.walk import evaluate
from linearize.tensorfile import Stored, read_header
from linearize.weights import Weights, give_memory_back

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
CHECKED = (1, 19)
LAST_EXPORT = "_FAKE_TENSOR_ID_TO_PROXY_MAP_FOR_EXPORT"  # torch 2.13 keeps the whole graph of the last export here
KEPT = ("val", "linearize_scope")  # of what tracing says of a node; the rest explains it, and is large


def capture_directory(directory: str | Path, device: torch.device | str = "cpu") -> Program:
    """`capture` of the transformers model in a local directory, of which no more than a tensor at a time is read.

    Raises:
        ArtifactError: there is no such model, or its files do not hold its parameters under their own names.
        CaptureError: as `capture`; or the graph is not the model by value.
    """
    from linearize.passes import CAPTURE_PASSES
    from linearize.passes.normalise.spell_casts import SpellCasts
    from linearize.passes.normalise.strip_noops import StripNoops
    from linearize.pipeline import run_pipeline

    files = stored_tensors(Path(directory))
    started = time.perf_counter()
    model = hf.skeleton(directory)
    weights = Weights(_by_parameter(model, files, directory), _dtypes(model), _take_buffers(model), device)
    program = _without_traces(capture_graph(model)).replace(weights=weights)
    if program.leaves:
        raise CaptureError(
            f"{', '.join(program.leaves)} could not be traced and would run the source's Python code, which needs its "
            "weights in memory; compile it without streaming"
        )
    _check_values(program)
    program = run_pipeline(program, [SpellCasts(), StripNoops()])  # casts to the meta device
    program = _checked(program, model).recorded("read_weights", started)
    del model
    return _without_traces(run_pipeline(program, CAPTURE_PASSES))


def _without_traces(program: Program) -> Program:
    """Let go of what grows with the number of layers and only explains: stack traces, and the texts of the passes.
    Layers are alike, so nodes of one shape share what they know of it."""
    shared: dict[Any, Any] = {}
    for node in program.graph.nodes:
        node.meta = {key: value for key, value in node.meta.items() if key in KEPT}
        if isinstance(node.meta.get("val"), Tensor):
            value = node.meta["val"]
            known = (value.dtype, value.device, *map(str, (*value.shape, *value.stride())))
            node.meta["val"] = shared.setdefault(known, value)
    program = program.replace(history=tuple(replace(record, text="") for record in program.history))
    getattr(proxy_tensor, LAST_EXPORT, {}).clear()
    gc.collect()
    give_memory_back()
    return program


def stored_tensors(directory: Path) -> dict[str, Stored]:
    """Every tensor of a directory's safetensors files, by the name that it has there.

    Raises:
        ArtifactError: there are none, or one is damaged.
    """
    if not (directory / "config.json").is_file():
        raise ArtifactError(f"{directory} is no directory with a config.json: not a transformers model")
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)[0]
    if not (directory / INDEX).is_file():
        raise ArtifactError(f"{directory} holds neither {SINGLE} nor {INDEX}; only safetensors can be read in pieces")
    try:
        names = set(json.loads((directory / INDEX).read_text())["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ArtifactError(f"{directory / INDEX} is damaged: {error}") from error
    found: dict[str, Stored] = {}
    for name in sorted(names):
        found |= read_header(directory / Path(name).name)[0]
    return found


def _by_parameter(model: nn.Module, files: dict[str, Stored], directory: str | Path) -> dict[str, Stored]:
    """Where each parameter is; names of one tied parameter share a place.

    Raises:
        ArtifactError: a parameter is not in the files under its name, or not in its shape.
    """
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[int, Stored] = {}
    named = list(model.named_parameters(remove_duplicate=False))
    named += [(name, buffer) for name, buffer in model.named_buffers(remove_duplicate=False) if name in files]  # type: ignore[misc]
    for name, parameter in named:
        stored = files.get(name) or files.get(name.removeprefix(prefix))
        if stored is not None:
            if stored.shape != tuple(parameter.shape):
                raise ArtifactError(
                    f"{directory}: {name} has shape {list(parameter.shape)} in the model and {list(stored.shape)} in "
                    "its file; it is converted while loading, which streaming does not do: compile without streaming"
                )
            found.setdefault(id(parameter), stored)
    missing = [name for name, parameter in named if id(parameter) not in found]
    if missing:
        raise ArtifactError(
            f"{directory}: no file holds {missing[0]} ({len(missing)} of {len(named)} parameters are stored under "
            "other names or not at all); streaming reads them by their own names: compile without streaming"
        )
    return {name: found[id(parameter)] for name, parameter in named}


def _dtypes(model: nn.Module) -> dict[str, torch.dtype]:
    return {name: parameter.dtype for name, parameter in model.named_parameters(remove_duplicate=False)}


def _take_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The model's buffers, which go to the meta device where its parameters are."""
    taken: dict[str, Tensor] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        for name, buffer in list(module._buffers.items()):
            if buffer is not None and not buffer.is_meta:
                taken[f"{path}.{name}" if path else name] = buffer.detach().clone()
                module._buffers[name] = buffer.to("meta")
            elif buffer is not None and path:
                pass
    return taken


def _check_values(program: Program) -> None:
    """Everything that the graph reads has values somewhere."""
    named = [*program.module.named_parameters(), *program.module.named_buffers()]
    assert program.weights is not None
    lost = [name for name, tensor in named if tensor.is_meta and name not in program.weights]
    if lost:
        raise CaptureError(f"{lost[0]} is made while the model runs and has no values on the meta device; "
                           "compile it without streaming")  # fmt: skip


def _checked(program: Program, model: nn.Module) -> Program:
    """The graph computes what the source does with its own weights, or a note says that this could not be seen; and
    whether the source counts positions over the padding, by value.

    Raises:
        CaptureError: it does not.
    """
    names = program.input_names()
    inputs = probe_inputs(names, *CHECKED, program.vocab_size or 2, program.place)
    try:
        expected = _source_logits(model, program, inputs)
        moves = _padding_moves(program, model) if {MASK, POSITIONS} <= set(names) else True
    except (RuntimeError, NotImplementedError, ValueError, TypeError) as error:
        note = f"the graph could not be compared with the model, which did not run in pieces ({first_line(error)})"
        return program.replace(notes=(*program.notes, note))
    worst = relative_difference(_graph_logits(program, inputs), expected)
    if not worst <= TOLERANCE:
        raise CaptureError(
            f"the captured graph of {program.model_name} differs from the model by {worst:.2g} (relative) at batch "
            f"{CHECKED[0]}, length {CHECKED[1]}; the model's computation depends on shapes in a way that tracing lost"
        )
    notes = tuple(note for note in program.notes if "without weights" not in note)
    return program.replace(padding_moves_positions=moves, notes=notes)


def _graph_logits(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    output = next(node for node in program.graph.nodes if node.op == "output")
    given = {node: inputs[str(node.target)] for node in program.placeholders()}
    logits: Tensor = evaluate(program.module, [output.args[0]], given)[0]  # type: ignore[list-item]
    return logits


def _source_logits(model: nn.Module, program: Program, inputs: dict[str, Tensor]) -> Tensor:
    assert program.weights is not None
    with lent(model, program.weights), torch.no_grad():
        return find_logits(model(**inputs, **({"use_cache": False} if hf.is_pretrained(model) else {})))


def _padding_moves(program: Program, model: nn.Module) -> bool:
    """As `torch_export._padding_moves_positions`, by the source's code in pieces."""
    inputs = probe_inputs(program.input_names(), 1, 11, program.vocab_size or 2, program.place)
    inputs[MASK][:, :4] = 0
    own = _source_logits(model, program, {name: inputs[name] for name in (TOKENS, MASK)})[:, 4:]
    counted = {**inputs, POSITIONS: (inputs[MASK].cumsum(1) - 1).clamp_min(0)}
    moved, apart = (relative_difference(_graph_logits(program, one)[:, 4:], own) for one in (inputs, counted))
    return moved <= max(apart, 1e-4)


@contextmanager
def lent(model: nn.Module, weights: Weights) -> Iterator[None]:
    """Every module of `model` has its own weights while it runs, and only then."""
    handles: list[Any] = []
    for path, module in model.named_modules(remove_duplicate=False):
        names = [name for name, one in [*module._parameters.items(), *module._buffers.items()] if one is not None]
        if names:
            prefix = f"{path}." if path else ""
            handles += _lend(module, {name: prefix + name for name in names}, weights)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _lend(module: nn.Module, names: dict[str, str], weights: Weights) -> list[Any]:
    own = (dict(module._parameters), dict(module._buffers))

    def before(*_: Any) -> None:
        for name, full in names.items():
            if full in weights:
                value = weights.get(full)
                if name in module._parameters:
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
                else:
                    module._buffers[name] = value

    def after(*_: Any) -> None:
        module._parameters.update(own[0])
        module._buffers.update(own[1])

    return [module.register_forward_pre_hook(before), module.register_forward_hook(after, always_call=True)]
