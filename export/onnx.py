"""The lowered graph as one ONNX file: T and B dynamic, state in, state out, opset 23.

Our operators enter through their decompositions, or in the native flavour as onnxruntime's own (`native.py`). Weights
lie in a safetensors file beside it, each content once.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

import torch
from torch import fx, nn

from linearize.errors import ExportError
from linearize.export.interface import Interface, example_inputs
from linearize.export.names import GRAPH_FILE, LOGITS, OPSET
from linearize.export.native import native_decompositions, portable_decompositions
from linearize.export.onnx_functions import FORMS, write_out
from linearize.program import MIXERS, node_scope

if TYPE_CHECKING:
    import onnx_ir as ir

    from linearize.runtime.model import LinearizedModel


def write_onnx(compiled: LinearizedModel, folder: Path, interface: Interface, portable: bool) -> None:
    """Write `model.onnx` and `model.safetensors` into `folder`.

    Raises:
        ExportError: an operator has no form in ONNX; it and its layer are named.
    """
    from linearize.export import onnx_graph

    model = translate(compiled, interface, portable)
    write_out(model)
    rename(model, interface)
    onnx_graph.tidy(model, portable, is_own(compiled))
    save(model, folder)
    _check(folder / GRAPH_FILE, portable)


def is_own(compiled: LinearizedModel) -> Callable[[ir.Value], bool]:
    """Whether a value of the graph is a weight of a mixer, as it is or transposed."""
    from linearize.export.quantize import digest, forms

    own = {digest(form) for tensor in own_weights(compiled) for form in forms(tensor)}
    shapes = {shape for shape, _ in own}

    def is_one(value: ir.Value) -> bool:
        tensor = value.const_value
        if tensor is None or tuple(tensor.shape) not in shapes:
            return False
        return digest(tensor.numpy()) in own

    return is_one


def own_weights(compiled: LinearizedModel) -> list[torch.Tensor]:
    return [p for name, p in compiled.source.module.named_parameters() if name.startswith(MIXERS)]


def write_quantized(kept: list[torch.Tensor], before: Path, folder: Path, kind: str) -> int:
    """Quantise what `write_onnx` wrote into `before`, and write it into `folder`; how many weights were. `kept` stay
    float32 (`own_weights`)."""
    import onnx_ir as ir

    from linearize.export.quantize import quantize

    model = ir.load(before / GRAPH_FILE)
    count = quantize(model, kind, kept)
    save(model, folder)
    return count


def save(model: ir.Model, folder: Path) -> None:
    import onnx_ir as ir

    from linearize.export.weights import move_weights

    move_weights(model, folder)
    ir.save(model, folder / GRAPH_FILE)


def translate(compiled: LinearizedModel, interface: Interface, portable: bool) -> ir.Model:
    """torch.export, decompose and translate; names and weights are still the exporter's."""
    inputs, dims = example_inputs(interface)
    shapes = _by_argument(interface, dims)
    return translate_module(interface.module, inputs, shapes, portable, compiled.program.graph)


def translate_module(
    module: nn.Module, inputs: tuple[Any, ...], dynamic_shapes: tuple[Any, ...] | None, portable: bool, graph: fx.Graph
) -> ir.Model:
    """`graph` is where an operator that has no form is looked for, to name its layer.

    Raises:
        ExportError: an operator has no form in ONNX.
    """
    table = (portable_decompositions() if portable else native_decompositions()) | FORMS
    with torch.no_grad(), _quiet():
        try:
            exported = torch.export.export(module, inputs, dynamic_shapes=dynamic_shapes)
            # torch.onnx decomposes once more anyway, by the global table: joining ours to it there saves a whole trace
            with patch.dict(torch._decomp.decomposition_table, table):
                program = torch.onnx.export(exported, dynamo=True, opset_version=OPSET, verbose=False, optimize=False)
        except Exception as error:  # the exporter's own errors have no common public base
            raise ExportError(explain(error, graph)) from error
    assert program is not None
    return program.model


def _by_argument(interface: Interface, dims: list[Any]) -> tuple[Any, ...]:
    """Dims in the form of the signature: inputs that come as *states are one tuple."""
    if isinstance(interface.module, fx.GraphModule):
        return tuple(dims)
    parameters = inspect.signature(interface.module.forward).parameters.values()
    first = sum(parameter.kind is not inspect.Parameter.VAR_POSITIONAL for parameter in parameters)
    return (*dims[:first], tuple(dims[first:]))


def rename(model: ir.Model, interface: Interface) -> None:
    """The interface's names, and `logits`; dims batch, length, past and total."""
    from linearize.export import onnx_graph

    tokens = interface.token_inputs()
    symbols: dict[str, str] = {}
    for value, (name, dims) in zip(model.graph.inputs, tokens.items(), strict=False):
        value.name = name
        symbols |= dict(zip(onnx_graph.symbols_of(value), dims, strict=True))
    for value, port in zip(list(model.graph.inputs)[len(tokens) :], interface.ports, strict=True):
        value.name = port.past
        if port.grows is not None:
            symbols[onnx_graph.symbols_of(value)[-1]] = "past"
    onnx_graph.name_outputs(model.graph, [LOGITS, *(port.present for port in interface.ports)])
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
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check(path: Path, portable: bool) -> None:
    """The checker knows no operator of onnxruntime's own; onnxruntime checks those when the parity check loads them."""
    import onnx

    if not portable:
        return

    try:
        onnx.checker.check_model(str(path))
    except onnx.checker.ValidationError as error:
        raise ExportError(f"the exported graph is not valid ONNX: {str(error).splitlines()[0]}") from error
