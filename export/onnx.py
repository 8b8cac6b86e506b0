"""The lowered graph as one ONNX file: T and B dynamic, state in, state out, standard operators of opset 23.

Our operators enter through their decompositions. Weights lie in a safetensors file beside it, each content once.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import Tensor, fx

from linearize.errors import ExportError
from linearize.export.names import GRAPH_FILE, LOGITS, OPSET, PAST, PRESENT
from linearize.ops import decompositions
from linearize.program import TOKENS, StateTensor, node_scope

if TYPE_CHECKING:
    import onnx_ir as ir

    from linearize.runtime.model import LinearizedModel

EXAMPLE = {"batch": 2, "length": 5, "past": 3}  # sizes that differ, so that no dim is taken for another


def write_onnx(compiled: LinearizedModel, folder: Path) -> None:
    """Write `model.onnx` and `model.safetensors` into `folder`.

    Raises:
        ExportError: an operator has no form in ONNX; it and its layer are named.
    """
    import onnx_ir as ir

    from linearize.export import onnx_graph
    from linearize.export.weights import move_weights

    model = translate(compiled)
    rename(model, compiled)
    onnx_graph.tidy(model)
    move_weights(model, folder)
    ir.save(model, folder / GRAPH_FILE)
    _check(folder / GRAPH_FILE)


def translate(compiled: LinearizedModel) -> ir.Model:
    """torch.export, decompose and translate; names and weights are still the exporter's."""
    inputs, dims = example_inputs(compiled)
    with torch.no_grad(), _quiet():
        try:
            exported = torch.export.export(compiled.graph_module, inputs, dynamic_shapes=dims)
            # torch.onnx decomposes once more anyway, by the global table: joining ours to it there saves a whole trace
            with patch.dict(torch._decomp.decomposition_table, decompositions()):
                program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False)
        except Exception as error:  # the exporter's own errors have no common public base
            raise ExportError(explain(error, compiled.program.graph)) from error
    assert program is not None
    return program.model


def example_inputs(compiled: LinearizedModel) -> tuple[tuple[Tensor, ...], tuple[dict[int, Any], ...]]:
    """One tensor of its own for each input (the same one twice would alias two inputs of the graph), and its dims."""
    batch, length, past = (torch.export.Dim(name, min=0 if name == "past" else 1) for name in EXAMPLE)
    tensors, dims = [], []
    for node in compiled.program.placeholders():
        state: StateTensor | None = node.meta.get("state")
        if state is None:
            tensors.append(torch.ones(EXAMPLE["batch"], EXAMPLE["length"], dtype=torch.int64))
            dims.append({0: batch, 1: length})
            continue
        axis = grows_axis(state)
        tensor = state.zeros(EXAMPLE["batch"])
        if axis is not None:
            tensor = tensor.new_zeros([EXAMPLE["past"] if i == axis else n for i, n in enumerate(tensor.shape)])
        tensors.append(tensor)
        dims.append(({0: batch} if state.batched else {}) | ({axis: past} if axis is not None else {}))
    return tuple(tensors), tuple(dims)


def grows_axis(state: StateTensor) -> int | None:
    """The dim of the whole tensor, batch included, whose length is the number of tokens seen."""
    return None if state.grows is None else state.grows + int(state.batched)


def rename(model: ir.Model, compiled: LinearizedModel) -> None:
    """`past.<state>` and `present.<state>`, `logits`; dims batch, length and past."""
    from linearize.export import onnx_graph

    axes = {spec.name: grows_axis(spec) for spec in compiled.state_specs}
    symbols: dict[str, str] = {}
    for value, name in zip(model.graph.inputs, compiled.program.input_names(), strict=True):
        value.name = f"{PAST}{name}" if name in axes else name
        if name == TOKENS:
            symbols |= dict(zip(onnx_graph.symbols_of(value), ("batch", "length"), strict=True))
        elif axes.get(name) is not None:
            symbols[onnx_graph.symbols_of(value)[-1]] = "past"
    outputs = [LOGITS, *(f"{PRESENT}{spec.name}" for spec in compiled.state_specs)]
    onnx_graph.name_outputs(model.graph, outputs)
    onnx_graph.name_dims(model.graph, symbols)


def explain(error: BaseException, graph: fx.Graph) -> str:
    """One line: the operator that stopped the export, and the layer that it is in."""
    messages = []
    cause: BaseException | None = error
    while cause is not None:
        messages.append(str(cause))
        cause = cause.__cause__ or cause.__context__
    found = re.search(r"torch\.ops\.([\w.]+)|(?:for|supported:) OpOverload\(op='([\w.]+)'", "\n".join(messages))
    if found is None:
        first = next((line.strip() for line in messages[-1].splitlines() if line.strip()), type(error).__name__)
        return f"the ONNX exporter stopped: {first}"
    operator = found.group(1) or found.group(2)
    places = [node_scope(node) for node in graph.nodes if str(node.target) == operator]
    where = f" in {places[0] or 'the top module'}" if places else ""
    return f"operator {operator}{where} has no form in ONNX opset {OPSET}; keep it out of the model to export it"


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's chatter (torchvision is missing, deprecations of its own) is nothing that a reader can act on."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph is not valid ONNX: {str(error).splitlines()[0]}") from error
