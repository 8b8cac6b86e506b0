"""Capture: an `nn.Module`, or what `torch.export` made of one, becomes a Program; its own attention is untouched."""

from __future__ import annotations

import time
import warnings
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from linearize.capture import hf
from linearize.capture.calling import Call, LogitsOnly, describe_call, find_logits
from linearize.capture.checks import SHAPES, check_causal, check_equal, guarded_shapes
from linearize.capture.exported import capture_exported
from linearize.capture.graphs import plain_module, vocabulary
from linearize.capture.ladder import Exported, Ladder
from linearize.capture.leaves import Leaf, Tracing
from linearize.capture.probing import probe_inputs, relative_difference
from linearize.capture.restore import left_as_it_was
from linearize.errors import CaptureError
from linearize.program import MASK, POSITIONS, TOKENS, Program


def capture(model: nn.Module | ExportedProgram | Program, example_inputs: Any = None) -> Program:
    """Turn a decoder-only language model into a Program: capture, normalise, match.

    Args:
        model: any `nn.Module` whose forward maps token ids int64 [B, T] to logits [B, T, V] (a tensor, an object with
            `.logits`, a tuple or a dict that holds them). It is left exactly as it was, buffers and mode included.
            Or a `torch.export.ExportedProgram` of such a model; a Program is returned as it is.
        example_inputs: token ids, or a dict of `input_ids`, `attention_mask`, `position_ids`; made up when None.

    Returns:
        A Program whose `sites` hold every softmax attention: matched, or refused with a reason. `captured_by` and
        `notes` say what it took: modules that stand opaque in the graph, dims that are static.

    Raises:
        CaptureError: the model cannot be traced, returns no logits, or is not causal.
    """
    from linearize.passes import CAPTURE_PASSES
    from linearize.pipeline import run_pipeline

    if isinstance(model, Program):
        return model
    return run_pipeline(capture_graph(model, example_inputs), CAPTURE_PASSES)


def capture_graph(model: nn.Module | ExportedProgram, example_inputs: Any = None) -> Program:
    """Only the graph, before normalising and matching. Same arguments and errors as `capture`."""
    started = time.perf_counter()
    if isinstance(model, ExportedProgram):
        return capture_exported(model, example_inputs).recorded("capture", started)
    if not isinstance(model, nn.Module):
        raise CaptureError(f"expected a torch.nn.Module, got a {type(model).__name__}")
    with left_as_it_was(model), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.eval()
        call = describe_call(model, example_inputs)
        if example_inputs is None and not _positions_from_zero(model, call):
            call = call.without(POSITIONS)
        wrapper = LogitsOnly(model, call)
        if call.inputs[TOKENS].device.type != "meta":  # sources look at values that only tracing can do without
            wrapper(*(tensor.clone() for tensor in call.inputs.values()))  # its own failure is told as it tells it
        program = _climb(wrapper, call)
        program = program.replace(padding_moves_positions=_padding_moves_positions(program, model, call))
    return program.recorded("capture", started)


def _climb(wrapper: LogitsOnly, call: Call) -> Program:
    model, names, device = wrapper.model, list(call.inputs), call.inputs[TOKENS].device

    def finish(exported: Exported, tracing: Tracing, dynamic: tuple[bool, bool]) -> Program:
        module, leaves = plain_module(exported, names, model, tracing)
        batch, length = call.inputs[TOKENS].shape
        program = Program(
            module=module,
            model_name=type(model).__name__,
            captured_by=_captured_by(leaves, dynamic),
            vocab_size=vocabulary(module),
            source_config=hf.config_dict(model),
            source_files=hf.tokenizer_files(model),
            fixed_batch=None if dynamic[0] else batch,
            fixed_length=None if dynamic[1] else length,
            notes=(*leaf_notes(leaves), *_static_notes(ladder, dynamic, (batch, length))),
        )
        check_capture(program, wrapper, call)
        return program if device.type != "meta" else program.replace(notes=(*program.notes, *_unchecked(program)))

    ladder = Ladder(wrapper, call, finish)
    return ladder.climb()


def _captured_by(leaves: dict[str, Leaf], dynamic: tuple[bool, bool]) -> str:
    text = "torch.export"
    if leaves:
        shown = ", ".join(list(leaves)[:3]) + (", ..." if len(leaves) > 3 else "")
        text += f" with {len(leaves)} opaque {'leaf' if len(leaves) == 1 else 'leaves'} ({shown})"
    fixed = [name for name, free in zip(("batch", "length"), dynamic, strict=True) if not free]
    return text + (f" at a static {' and '.join(fixed)}" if fixed else "")


def leaf_notes(leaves: dict[str, Leaf]) -> list[str]:
    """What the user should know of the modules that could not be traced."""
    notes = []
    for name, leaf in leaves.items():
        how = "mixes tokens" if leaf.mixes_tokens else "token by token"
        if leaf.far_positions:
            how += ", but past its trained length every position changes the others (dynamic scaling)"
        notes.append(f"{name} stands opaque in the graph ({how}): {leaf.reason}")
    return notes


def _static_notes(ladder: Ladder, dynamic: tuple[bool, bool], shape: tuple[int, int]) -> list[str]:
    fixed = [f"{what} {size}" for what, size, free in zip(("batch", "length"), shape, dynamic, strict=True) if not free]
    if not fixed:
        return []
    return [
        f"captured at a static {' and '.join(fixed)}, to be looked at only: it runs at no other, and cannot be "
        f"compiled. {ladder.last_failure}"
    ]


def _unchecked(program: Program) -> list[str]:
    """What could not be found out without weights."""
    notes = []
    if program.leaves:
        notes.append("without weights, what is known of opaque modules comes from random numbers in their place")
    lengths = [length for batch, length in guarded_shapes(program.graph) if batch == 2]
    if lengths:
        notes.append(
            f"without weights it cannot be checked that the graph is right from length {min(lengths)} on, where "
            "conditions that tracing assumed do not hold"
        )
    return notes


def check_capture(program: Program, wrapper: LogitsOnly, call: Call) -> None:
    """The graph equals the model at shapes that were not traced, and later tokens do not move earlier logits.

    Raises:
        CaptureError: it does not. Skipped on the meta device, where there are no values.
    """
    tokens = call.inputs[TOKENS]
    if tokens.device.type == "meta":
        return
    names = list(call.inputs)
    shapes = [*SHAPES, *guarded_shapes(program.graph)]
    fixed = (program.fixed_batch, program.fixed_length)
    if program.is_static:
        shapes = [(fixed[0] or batch, fixed[1] or length) for batch, length in SHAPES]
    check_equal(program, wrapper, names, list(dict.fromkeys(shapes)))
    check_causal(program, names, fixed[0] or 1, fixed[1] or 11)


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
    batch, length = program.fixed_batch or 1, program.fixed_length or 11
    inputs = probe_inputs(list(call.inputs), batch, length, program.vocab_size or 2, call.inputs[TOKENS].device)
    inputs[MASK][:, :4] = 0
    own = find_logits(model(**{name: inputs[name] for name in (TOKENS, MASK)}, **call.fixed))
    counted = {**inputs, POSITIONS: (inputs[MASK].cumsum(1) - 1).clamp_min(0)}
    moved, counted_apart = (
        relative_difference(program.module(*given.values())[:, 4:], own[:, 4:]) for given in (inputs, counted)
    )
    return moved <= max(counted_apart, 1e-4)  # a rotary source cannot tell
