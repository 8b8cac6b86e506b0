"""Capture of a `torch.export.ExportedProgram`: inputs recognised by name, logits found in what it returns."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind
from torch.utils import _pytree as pytree

from linearize.capture.calling import find_logits
from linearize.capture.checks import SHAPES, check_causal, check_equal
from linearize.capture.functional import functional
from linearize.capture.graphs import copy_graph, root_of, vocabulary
from linearize.capture.probing import probe_inputs
from linearize.errors import CaptureError
from linearize.program import MASK, POSITIONS, TOKENS, Program

KNOWN = {
    TOKENS: ("input_ids", "tokens", "token_ids", "ids", "idx", "src", "x"),
    MASK: ("attention_mask", "mask", "padding_mask"),
    POSITIONS: ("position_ids", "positions", "input_pos", "pos"),
}
Shape = tuple[int | None, int | None]


def capture_exported(exported: ExportedProgram, example_inputs: Any = None) -> Program:
    """The Program of an exported model; a dim that was exported as a number stays static.

    Raises:
        CaptureError: its inputs are not token ids (with a mask and positions), it writes into buffers or inputs, or
            returns no logits.
    """
    if example_inputs is not None:
        raise CaptureError("an ExportedProgram has its example inputs already; pass it alone")
    with torch.no_grad():
        pure = functional(exported)
        check_pure(pure)
        source = pure.module()
        assert isinstance(source, fx.GraphModule)
        placeholders = source.graph.find_nodes(op="placeholder")
        tensors = [node for node in placeholders if not _is_constant(node)]
        names = recognise(tensors)
        shape = input_shape(tensors, names)
        rest = iter(names)
        given = [None if _is_constant(node) else next(rest) for node in placeholders]
        graph, attributes = copy_graph(source, given, "", _logits_index(pure))
        module = fx.GraphModule(root_of(attributes, {}), graph, class_name="Captured")
        program = Program(
            module=module,
            model_name=model_name(graph),
            captured_by="torch.export by the caller" + _static_text(shape),
            vocab_size=vocabulary(module),
            fixed_batch=shape[0],
            fixed_length=shape[1],
            notes=tuple(_notes(exported, shape)),
        )
        _check(program, pure, names, shape)
    return program


def _is_constant(node: fx.Node) -> bool:
    """An argument that was no tensor when the program was exported (use_cache=False) is part of what it computes."""
    value = node.meta.get("val")
    return value is None or isinstance(value, bool | int | float | str)


def check_pure(exported: ExportedProgram) -> None:
    """Raises CaptureError where running the program changes a buffer or an input."""
    writes = (OutputKind.BUFFER_MUTATION, OutputKind.USER_INPUT_MUTATION)
    written = [spec.target for spec in exported.graph_signature.output_specs if spec.kind in writes]
    if written:
        raise CaptureError(
            f"the ExportedProgram writes into {', '.join(map(str, written))}; export the model without its cache "
            "(use_cache=False), so that it is a function of its inputs"
        )
    others = [spec for spec in exported.graph_signature.input_specs if spec.kind is InputKind.CUSTOM_OBJ]
    if others:
        raise CaptureError(f"the ExportedProgram holds the object {others[0].target}, which no Program can")


def recognise(placeholders: list[fx.Node]) -> list[str]:
    """`input_ids`, `attention_mask` or `position_ids` for every input, by its name; a single one is the token ids."""
    for node in placeholders:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor) or value.ndim != 2 or value.dtype != torch.int64:
            what = f"{value.dtype} {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
            raise CaptureError(
                f"the ExportedProgram takes {node.name} ({what}); linearize takes programs of int64 tensors "
                f"[batch, length]: {TOKENS}, and where the model has them {MASK} and {POSITIONS}"
            )
    if len(placeholders) == 1:
        return [TOKENS]
    names = [next((known for known, also in KNOWN.items() if node.name in also), None) for node in placeholders]
    unknown = [node.name for node, name in zip(placeholders, names, strict=True) if name is None]
    if unknown or TOKENS not in names or len(set(names)) < len(names):
        raise CaptureError(
            f"the ExportedProgram takes {[node.name for node in placeholders]}; which of them is {TOKENS}, {MASK} or "
            f"{POSITIONS} cannot be told: export the model with these keywords"
        )
    return [str(name) for name in names]


def input_shape(placeholders: list[fx.Node], names: list[str]) -> Shape:
    """(batch, length) of the token ids, None where dynamic."""
    tokens = placeholders[names.index(TOKENS)].meta["val"]
    sizes: list[int | None] = []
    for size, what in zip(tokens.shape, ("batch", "length"), strict=True):
        if isinstance(size, torch.SymInt) and not size.node.expr.is_Symbol:
            raise CaptureError(f"the ExportedProgram takes a {what} of {size} only; export it with a free dim")
        sizes.append(None if isinstance(size, torch.SymInt) else int(size))
    return sizes[0], sizes[1]


def _logits_index(exported: ExportedProgram) -> int:
    """Where the logits are among the flat outputs."""
    outputs = [node for node in exported.graph.find_nodes(op="output")[0].args[0]]
    values = [node.meta.get("val") if isinstance(node, fx.Node) else node for node in outputs]
    logits = find_logits(pytree.tree_unflatten(values, exported.call_spec.out_spec))  # type: ignore[arg-type]
    return next(index for index, value in enumerate(values) if value is logits)


def model_name(graph: fx.Graph) -> str:
    """The class of the exported model, as its nodes tell it."""
    for node in graph.nodes:
        for path, kind in (node.meta.get("nn_module_stack") or {}).values():
            if path == "":
                return str(getattr(kind, "__name__", kind)).rpartition(".")[2]
    return "ExportedProgram"


def _static_text(shape: Shape) -> str:
    fixed = [what for what, size in zip(("batch", "length"), shape, strict=True) if size is not None]
    return f" at a static {' and '.join(fixed)}" if fixed else ""


def _notes(exported: ExportedProgram, shape: Shape) -> list[str]:
    notes = [
        f"exported for sizes {name} from {bounds.lower} to {bounds.upper}: nothing is known of others"
        for name, bounds in exported.range_constraints.items()
        if int(bounds.lower) > 2 or bounds.upper.is_Integer
    ]
    if shape != (None, None):
        fixed = [f"{what} {n}" for what, n in zip(("batch", "length"), shape, strict=True) if n is not None]
        notes.append(
            f"exported at a static {' and '.join(fixed)}: it runs at no other, and cannot be compiled; export it again "
            "with dynamic_shapes"
        )
    return notes


def _check(program: Program, exported: ExportedProgram, names: list[str], shape: Shape) -> None:
    """Beside the exported program itself, at the shapes that it accepts."""
    if program.device.type == "meta":
        return
    own = exported.module()
    arguments = [s.arg for s in exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        rest = iter(tensors)
        flat = [arg.value if isinstance(arg, ConstantArgument) else next(rest) for arg in arguments]
        args, kwargs = pytree.tree_unflatten(flat, exported.call_spec.in_spec)  # type: ignore[arg-type]
        return find_logits(own(*args, **kwargs))

    shapes = [(shape[0] or batch, shape[1] or length) for batch, length in (*SHAPES[:2], (2, 13))]
    accepted = [each for each in dict.fromkeys(shapes) if _accepts(run, names, each, program)]
    check_equal(program, run, names, accepted)
    if accepted:
        check_causal(program, names, *accepted[0])


def _accepts(run: Any, names: list[str], shape: tuple[int, int], program: Program) -> bool:
    try:
        run(*probe_inputs(names, *shape, program.vocab_size or 2, program.device).values())
    except (RuntimeError, AssertionError, IndexError, ValueError):
        return False
    return True
