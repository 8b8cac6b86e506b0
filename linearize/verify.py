"""What must hold between passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from linearize.errors import VerificationError
from linearize.program import LEAF, MASK, POSITIONS, TOKENS, Program, StateTensor, node_scope, op_name
from linearize.rewriting.continuation import PADDED, probe, probe_lengths, read_continuation
from linearize.rewriting.walk import evaluate, shape_of

EXACT_TOLERANCE = 1e-5
PIECES_TOLERANCE, PIECES_TOLERANCE_IN_HALF = 1e-3, 3e-2  # what is not continued differs by 0.1 and more


def check_structure(program: Program, name: str) -> None:
    """The graph is well formed, mutates nothing, and its shapes work out on fake tensors.

    Raises:
        VerificationError: naming the pass and the node.
    """
    try:
        program.graph.lint()
    except RuntimeError as error:
        raise VerificationError(f"after pass {name}: {error}") from error
    for node in program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise VerificationError(f"after pass {name}: {node.name} mutates its input ({op_name(node)})")
    _check_symbols(program, name)
    check_shapes(program, name)


def _check_symbols(program: Program, name: str) -> None:
    """Batch and length are still symbols: an operator that asks for a size as a number makes them those traced."""
    tokens = next((node for node in program.placeholders() if node.target == TOKENS), None)
    fixed = (program.fixed_batch, program.fixed_length)
    for what, dim, known in zip(("batch", "length"), shape_of(tokens) if tokens else (), fixed, strict=False):
        if known is None and isinstance(dim, torch.SymInt) and dim.node.expr.is_number:
            raise VerificationError(f"after pass {name}: the {what} is no longer dynamic, but {dim} as traced")


def check_shapes(program: Program, name: str, batch: int = 2, length: int = 13) -> None:
    """Run the graph on fake tensors at one batch and length: every operator accepts its inputs, logits have rank 3."""
    try:
        shapes = shapes_at(program, batch, length)
    except Exception as error:
        raise VerificationError(f"after pass {name}: {_first_line(error)}") from error
    logits = shapes[logits_node(program.graph)]
    if len(logits) != 3:
        raise VerificationError(f"after pass {name}: logits have shape {list(logits)}, not [B, T, V]")


def logits_node(graph: fx.Graph) -> fx.Node:
    """The first output."""
    outputs: Any = next(iter(reversed(graph.nodes))).args[0]
    node: fx.Node = outputs[0] if isinstance(outputs, list | tuple) else outputs
    return node


def shapes_at(program: Program, batch: int, length: int) -> dict[fx.Node, tuple[int, ...]]:
    """The shape of every node that is a tensor, at this batch and length (or those that the program is fixed to)."""
    batch, length = program.fixed_batch or batch, program.fixed_length or length
    environment = ShapeEnv()  # for operators that return as many rows as the values say
    with FakeTensorMode(allow_non_fake_inputs=True, shape_env=environment), torch.no_grad():
        place = _place(program)
        inputs = [_fake_input(node, place, batch, length) for node in program.placeholders()]
        interpreter = _Shapes(program.module, place)
        interpreter.run(*inputs)
    return interpreter.shapes


class _Shapes(fx.Interpreter):
    """Keeps the shapes. Opaque leaves give what their shape function says: they could not run without values. What is
    on the meta device counts as being at `place`."""

    def __init__(self, module: fx.GraphModule, place: torch.device) -> None:
        super().__init__(module, garbage_collect_values=True)
        self.shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._place = place

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        value = super().get_attr(target, args, kwargs)
        away = isinstance(value, torch.Tensor) and value.is_meta and self._place.type != "meta"
        return torch.empty_like(value, device=self._place) if away else value

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        if str(kwargs.get("device")) == "meta":
            kwargs = {**kwargs, "device": self._place}
        return super().call_function(target, args, kwargs)

    def run_node(self, node: fx.Node) -> Any:
        value = self._value(node)
        if isinstance(value, torch.Tensor):
            self.shapes[node] = tuple(value.shape)
        return value

    def _value(self, node: fx.Node) -> Any:
        if LEAF not in node.meta:
            return super().run_node(node)
        args, kwargs = self.fetch_args_kwargs_from_env(node)
        return node.meta[LEAF]["outputs"](args, kwargs)


def _place(program: Program) -> torch.device:
    """Where the parameters are; of a model on disk, of which some have values already, where the rest will be."""
    some = any(not parameter.is_meta for parameter in program.module.parameters())
    return program.place if program.weights is not None and some else program.device


def _fake_input(node: fx.Node, place: torch.device, batch: int, length: int) -> torch.Tensor:
    state: StateTensor | None = node.meta.get("state")
    if state is not None:
        return state.zeros(batch, place)
    return torch.ones((batch, length), dtype=torch.int64, device=place)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def check_exact(before: Program, after: Program, name: str, batch: int = 2, length: int = 11) -> None:
    """Both programs give the same logits at a probe. Skipped without weights (meta device).

    Raises:
        VerificationError: they differ by more than 1e-5 of the largest logit.
    """
    if before.device.type == "meta":
        return
    batch, length = before.fixed_batch or batch, before.fixed_length or length
    expected, actual = (_probe_logits(program, batch, length) for program in (before, after))
    worst = ((actual - expected).abs().amax() / expected.abs().amax().clamp_min(1e-12)).item()
    if not worst <= EXACT_TOLERANCE:
        raise VerificationError(f"pass {name} says that it is exact, but logits moved by {worst:.2g} (relative)")


def _probe_logits(program: Program, batch: int, length: int) -> torch.Tensor:
    device = program.device
    ids = torch.arange(batch * length, device=device).reshape(batch, length) % (program.vocab_size or 2)
    made: dict[str, Any] = {
        TOKENS: ids,
        MASK: torch.ones_like(ids),
        POSITIONS: torch.arange(length, device=device).expand_as(ids),
    }
    inputs = [
        node.meta["state"].zeros(batch, device) if "state" in node.meta else made[str(node.target)]
        for node in program.placeholders()
    ]
    with torch.no_grad():
        output = program.module(*inputs)
    return output[0] if isinstance(output, tuple | list) else output


def check_state_threading(program: Program, tolerance: float | None = None) -> None:
    """Three pieces with the state between them, one a single token, give what one call gives, padding included.

    `tolerance` is relative to the largest logit; None takes 1e-3, or 3e-2 for a model with weights in half precision.

    Raises:
        VerificationError: they differ; it names the first node that is not continued from the state.
    """
    if program.device.type == "meta" or program.stateless_reason:
        return
    worst, error = pieces_difference(program)
    if tolerance is None:
        tolerance = PIECES_TOLERANCE_IN_HALF if _in_half(program) else PIECES_TOLERANCE
    if error is None and worst <= tolerance:
        return
    what = f"does not run ({_first_line(error)})" if error is not None else f"differs by {worst:.2g} (relative)"
    raise VerificationError(
        f"{program.model_name} run in pieces, with the state between them, {what}: {_first_not_continued(program)}"
    )


def _in_half(program: Program) -> bool:
    return any(weight.dtype in (torch.float16, torch.bfloat16) for weight in program.module.parameters())


def pieces_difference(program: Program) -> tuple[float, Exception | None]:
    """(largest difference of logits between one call and pieces of it, over the largest logit; the error if the pieces
    do not run)."""
    length, first = probe_lengths(program)
    inputs = probe(program, 2, length, min(PADDED, first - 1))
    whole, _ = _run_piece(program, None, inputs, 0, length)
    found, state = [], None
    try:
        for start, stop in ((0, first), (first, length - 1), (length - 1, length)):
            logits, state = _run_piece(program, state, inputs, start, stop)
            found.append(logits)
    except (RuntimeError, IndexError, ValueError) as error:
        return float("inf"), error
    every = found[0].shape[1] == first
    real = inputs[MASK].bool() if every else slice(None)
    pieces = torch.cat(found, dim=1) if every else found[-1]
    worst = (pieces - whole)[real].abs().amax() / whole[real].abs().amax().clamp_min(1e-12)
    return (worst.item() if worst == worst else float("inf")), None


def _run_piece(
    program: Program, state: list[torch.Tensor] | None, inputs: dict[str, torch.Tensor], start: int, stop: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    nodes = program.placeholders()
    if state is None:
        state = [node.meta["state"].zeros(2, program.place) for node in nodes if "state" in node.meta]
    given = [inputs[str(node.target)][:, start:stop] for node in nodes if "state" not in node.meta]
    logits, *new_state = _run_whole(program, [*given, *state])
    return logits, new_state


def _run_whole(program: Program, inputs: list[torch.Tensor]) -> Any:
    """The graph's output; a model that stays on disk is read as it runs."""
    with torch.no_grad():
        if program.weights is None:
            return program.module(*inputs)
        output = next(node for node in program.graph.nodes if node.op == "output")
        nodes = list(output.args[0]) if isinstance(output.args[0], tuple | list) else [output.args[0]]
        return evaluate(program.module, nodes, dict(zip(program.placeholders(), inputs, strict=True)))


def _first_not_continued(program: Program) -> str:
    wrong = read_continuation(program).wrong
    if not wrong:
        return "every node is continued within rounding, so the pieces drift apart by rounding alone"
    node = wrong[0]
    where = f" in {node_scope(node)}" if node_scope(node) else ""
    return f"{node.name} = {op_name(node)}{where} is the first that looks at other tokens and has no state for them"
