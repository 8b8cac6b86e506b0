"""What must hold between passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from linearize.errors import VerificationError
from linearize.program import MASK, POSITIONS, TOKENS, Program, StateTensor, op_name

EXACT_TOLERANCE = 1e-5


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
    check_shapes(program, name)


def check_shapes(program: Program, name: str, batch: int = 2, length: int = 13) -> None:
    """Run the graph on fake tensors at one batch and length: every operator accepts its inputs, logits have rank 3."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [_fake_input(node, program, batch, length) for node in program.placeholders()]
        try:
            with torch.no_grad():
                output = fx.Interpreter(program.module, garbage_collect_values=True).run(*inputs)
        except Exception as error:
            raise VerificationError(f"after pass {name}: {_first_line(error)}") from error
    logits = output[0] if isinstance(output, tuple | list) else output
    if logits.ndim != 3:
        raise VerificationError(f"after pass {name}: logits have shape {list(logits.shape)}, not [B, T, V]")


def _fake_input(node: fx.Node, program: Program, batch: int, length: int) -> torch.Tensor:
    state: StateTensor | None = node.meta.get("state")
    if state is not None:
        return state.zeros(batch, program.device)
    return torch.ones((batch, length), dtype=torch.int64, device=program.device)


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


def check_state_threading(program: Program, tolerance: float = 1e-3) -> None:
    """Two pieces with the state between them give what one call gives: no position or mask was missed.

    Raises:
        VerificationError: they differ; the model takes positions from somewhere that no rewrite knows.
    """
    if program.device.type == "meta" or program.stateless_reason:
        return
    whole, _ = _run_piece(program, None, 0, 14)
    first, state = _run_piece(program, None, 0, 9)
    try:
        second, _ = _run_piece(program, state, 9, 14)
    except (RuntimeError, IndexError, ValueError) as error:
        raise VerificationError(
            f"{program.model_name} does not run in two pieces ({_first_line(error)}): it computes positions or masks "
            "in a way that could not be continued from a state"
        ) from error
    pieces = torch.cat([first, second], dim=1) if first.shape[1] == 9 else second
    worst = ((pieces - whole).abs().amax() / whole.abs().amax().clamp_min(1e-12)).item()
    if not worst <= tolerance:
        raise VerificationError(
            f"{program.model_name} run in two pieces differs from one call by {worst:.2g} (relative): it computes "
            "positions or masks in a way that could not be continued from a state"
        )


def _run_piece(
    program: Program, state: list[torch.Tensor] | None, start: int, stop: int
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    ids = (torch.arange(2 * 14, device=program.device).reshape(2, 14) * 7 % (program.vocab_size or 2))[:, start:stop]
    made = {
        TOKENS: ids,
        MASK: torch.ones_like(ids),
        POSITIONS: torch.arange(start, stop, device=ids.device).expand_as(ids),
    }
    nodes = program.placeholders()
    if state is None:
        state = [node.meta["state"].zeros(2, program.device) for node in nodes if "state" in node.meta]
    inputs = [made[str(node.target)] for node in nodes if "state" not in node.meta]
    with torch.no_grad():
        logits, *new_state = program.module(*inputs, *state)
    return logits, new_state
