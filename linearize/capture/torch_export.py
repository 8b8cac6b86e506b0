"""Capture by plain non-strict `torch.export`: dynamic batch and length, the model's own attention untouched."""

from __future__ import annotations

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn

from linearize.capture import hf
from linearize.capture.calling import Call, LogitsOnly, describe_call, find_logits
from linearize.errors import CaptureError
from linearize.program import MASK, POSITIONS, TOKENS, Program


def capture(model: nn.Module, example_inputs: Any = None) -> Program:
    """Turn a decoder-only language model into a Program: capture, normalise, match.

    Args:
        model: any `nn.Module` whose forward maps token ids int64 [B, T] to logits [B, T, V] (a tensor, an object with
            `.logits`, a tuple or a dict that holds them). It is left exactly as it was, buffers and mode included.
        example_inputs: token ids, or a dict of `input_ids`, `attention_mask`, `position_ids`; made up when None.

    Returns:
        A Program whose `sites` hold every softmax attention: matched, or refused with a reason.

    Raises:
        CaptureError: the model cannot be traced, returns no logits, or is not causal.
    """
    from linearize.passes import CAPTURE_PASSES
    from linearize.pipeline import run_pipeline

    return run_pipeline(capture_graph(model, example_inputs), CAPTURE_PASSES)


def capture_graph(model: nn.Module, example_inputs: Any = None) -> Program:
    """Only the graph, before normalising and matching. Same arguments and errors as `capture`."""
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got a {type(model).__name__}")
    started = time.perf_counter()
    with _left_as_it_was(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()
        call = describe_call(model, example_inputs)
        if example_inputs is None and not _positions_from_zero(model, call):
            call = call.without(POSITIONS)
        wrapper = LogitsOnly(model, call)
        exported = _export(wrapper, call)
        module = _plain_module(exported, list(call.inputs))
        program = Program(
            module=module,
            model_name=type(model).__name__,
            captured_by="torch.export",
            vocab_size=_vocabulary(module),
            source_config=hf.config_dict(model),
            source_files=hf.tokenizer_files(model),
        )
        check_capture(program, wrapper, call)
        program = program.replace(padding_moves_positions=_padding_moves_positions(program, model, call))
    return program.recorded("capture", started)


def _export(wrapper: LogitsOnly, call: Call) -> torch.export.ExportedProgram:
    dynamic = torch.export.Dim.DYNAMIC
    shapes = ({0: dynamic, 1: dynamic},) * len(call.inputs)
    example = tuple(tensor.clone() for tensor in call.inputs.values())
    if example[0].device.type != "meta":  # sources look at values that only tracing can do without
        wrapper(*example)  # an ordinary failure of the model is told as the model tells it
    try:
        with _quiet():
            exported = torch.export.export(wrapper, example, dynamic_shapes=(shapes,), strict=False)
            return exported.run_decompositions({})
    except Exception as error:
        raise CaptureError(_why_not_traced(wrapper.model, error)) from error


def _why_not_traced(model: nn.Module, error: BaseException) -> str:
    """Name the model's innermost module on the traceback, and torch's own first line."""
    names = {id(module): name for name, module in model.named_modules()}
    where, trace = "", error.__traceback__
    while trace is not None:
        owner = names.get(id(trace.tb_frame.f_locals.get("self")))
        where = owner or where
        trace = trace.tb_next
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    place = f" in module {where!r}" if where else ""
    return (
        f"torch.export cannot trace {type(model).__name__}{place}: {first}; "
        "make that module's control flow independent of tensor values and of batch and length"
    )


def _plain_module(exported: torch.export.ExportedProgram, names: list[str]) -> fx.GraphModule:
    """The exported graph with inputs under their own names, parameters under the source's, one tensor returned."""
    source = exported.module()
    assert isinstance(source, fx.GraphModule)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    attributes: dict[str, Any] = {}
    inputs = iter(names)
    for node in source.graph.nodes:
        if node.op == "placeholder":
            mapping[node] = graph.placeholder(next(inputs))
            mapping[node].meta = dict(node.meta)
        elif node.op == "get_attr":
            target = str(node.target).removeprefix("model.")
            attributes[target] = _attribute(source, str(node.target))
            mapping[node] = graph.get_attr(target)
            mapping[node].meta = dict(node.meta)
        elif node.op == "output":
            (logits,) = node.args[0] if isinstance(node.args[0], tuple | list) else (node.args[0],)
            graph.output(mapping[logits])
        elif not (node.op == "call_module" and node.target == "_guards_fn"):
            mapping[node] = graph.node_copy(node, lambda old: mapping[old])
            _strip_wrapper_scope(mapping[node])
    return fx.GraphModule(attributes, graph, class_name="Captured")


def _strip_wrapper_scope(node: fx.Node) -> None:
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    node.meta["linearize_scope"] = paths[-1].removeprefix("model").removeprefix(".") if paths else ""


def _attribute(module: nn.Module, target: str) -> Any:
    value: Any = module
    for part in target.split("."):
        value = getattr(value, part)
    return value


def _vocabulary(module: fx.GraphModule) -> int | None:
    """Rows of the table that token ids index, or None where ids meet no embedding."""
    for node in module.graph.nodes:
        if node.target is torch.ops.aten.embedding.default and _is_tokens(node.args[1]):
            return int(node.args[0].meta["val"].shape[0])
    return None


def _is_tokens(node: Any) -> bool:
    while isinstance(node, fx.Node) and node.op == "call_function" and node.args:
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target == TOKENS


def check_capture(program: Program, wrapper: LogitsOnly, call: Call) -> None:
    """The graph equals the model at shapes that were not traced, and later tokens do not move earlier logits.

    Raises:
        CaptureError: it does not. Skipped on the meta device, where there are no values.
    """
    tokens = call.inputs[TOKENS]
    if tokens.device.type == "meta":
        return
    for batch, length in ((1, 19), (3, 8), (2, 1)):
        inputs = probe_inputs(list(call.inputs), batch, length, program.vocab_size or 2, tokens.device)
        expected = wrapper(*inputs.values())
        problem = _disagreement(program, inputs, expected)
        if problem:
            raise CaptureError(
                f"the captured graph of {program.model_name} {problem} at batch {batch}, length {length}; "
                "the model's computation depends on shapes in a way that tracing lost"
            )
    _check_causal(program, list(call.inputs), tokens.device)


def _positions_from_zero(model: nn.Module, call: Call) -> bool:
    """Whether the source, given no positions, numbers them 0, 1, 2, ...; RoBERTa's kind counts in the token ids, from
    another number, and is captured as it does so. True where there are no values to tell by."""
    if POSITIONS not in call.inputs or call.inputs[TOKENS].device.type == "meta":
        return True
    given, own = LogitsOnly(model, call), call.without(POSITIONS)
    try:
        from_zero = given(*call.inputs.values())
    except (RuntimeError, IndexError, ValueError):
        return True  # told by the capture itself
    return relative_difference(from_zero, LogitsOnly(model, own)(*own.inputs.values())) <= 1e-4


def _padding_moves_positions(program: Program, model: nn.Module, call: Call) -> bool:
    """Whether the source, given a mask but no positions, numbers them from 0 over the padding; found by value."""
    if not {MASK, POSITIONS} <= set(call.inputs) or call.inputs[TOKENS].device.type == "meta":
        return True
    inputs = probe_inputs(list(call.inputs), 1, 11, program.vocab_size or 2, call.inputs[TOKENS].device)
    inputs[MASK][:, :4] = 0
    own = find_logits(model(**{name: inputs[name] for name in (TOKENS, MASK)}, **call.fixed))
    counted = {**inputs, POSITIONS: (inputs[MASK].cumsum(1) - 1).clamp_min(0)}
    moved, counted_apart = (
        relative_difference(program.module(*given.values())[:, 4:], own[:, 4:]) for given in (inputs, counted)
    )
    return moved <= max(counted_apart, 1e-4)  # a rotary source cannot tell


def _disagreement(program: Program, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> str:
    """How the graph's logits fail to be `expected` ('' where they are)."""
    try:
        actual = program.module(*inputs.values())
    except (RuntimeError, IndexError, ValueError) as error:
        return f"does not run ({str(error).strip().splitlines()[0]})"
    if actual.shape != expected.shape:
        return f"gives logits of shape {list(actual.shape)}, not {list(expected.shape)}"
    worst = relative_difference(actual, expected)
    return "" if worst <= 1e-4 else f"differs from the model by {worst:.2g} (relative)"


def _check_causal(program: Program, names: list[str], device: torch.device) -> None:
    inputs = probe_inputs(names, 1, 11, program.vocab_size or 2, device)
    before = program.module(*inputs.values())
    if before.shape[1] != 11:
        return  # only some positions' logits are returned: nothing earlier to compare
    inputs[TOKENS] = inputs[TOKENS].clone()
    inputs[TOKENS][:, -1] = (inputs[TOKENS][:, -1] + 1) % (program.vocab_size or 2)
    after = program.module(*inputs.values())
    moved = (after - before)[:, :-1].abs().amax().item()
    if moved > 1e-3 * before.abs().amax().item():
        raise CaptureError(
            f"{program.model_name} is not a decoder: changing the last token changes the logits of earlier positions "
            f"(by {moved:.2g}); linearize takes causal language models"
        )


def probe_inputs(
    names: list[str], batch: int, length: int, vocab_size: int, device: torch.device | str = "cpu"
) -> dict[str, torch.Tensor]:
    """Reproducible int64 [B, T] by name: random token ids below `vocab_size`, a mask of ones, positions from 0."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocab_size, (batch, length), generator=generator).to(device)
    made = {
        TOKENS: ids,
        MASK: torch.ones_like(ids),
        POSITIONS: torch.arange(length, device=device).expand(batch, length).contiguous(),
    }
    return {name: made[name] for name in names if name in made}


def relative_difference(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """max |actual - expected| over max |expected|; NaN counts as infinite."""
    worst = ((actual - expected).abs().amax() / expected.abs().amax().clamp_min(1e-12)).item()
    return worst if worst == worst else float("inf")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep torch.export from printing the whole graph when it fails: the error says where and what."""
    logger = logging.getLogger("torch.fx.experimental.symbolic_shapes")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Restore mode, buffers and attributes of every module: some cache tensors in forward, and tracing leaves fakes."""
    before: list[tuple[nn.Module, dict[str, Any], dict[str, Any], dict[str, Any], dict[str, Any]]] = [
        (module, dict(module.__dict__), dict(module._buffers), dict(module._parameters), dict(module._modules))
        for module in model.modules()
    ]
    try:
        yield
    finally:
        for module, attributes, buffers, parameters, modules in before:
            module.__dict__.clear()
            module.__dict__.update(attributes)
            for held, kept in (
                (module._buffers, buffers),
                (module._parameters, parameters),
                (module._modules, modules),
            ):
                held.clear()
                held.update(kept)
