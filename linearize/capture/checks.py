"""A captured graph beside its model: equal at shapes that were not traced, and blind to later tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from linearize.capture.probing import first_line, probe_inputs, relative_difference
from linearize.errors import CaptureError
from linearize.program import TOKENS, Program

SHAPES = ((1, 19), (3, 8), (2, 1))
LONGEST = 1100
TOLERANCE = 1e-4
Run = Callable[..., torch.Tensor]


class Mismatch(CaptureError):
    """The graph is not the model at some shape, though tracing succeeded."""

    def __init__(self, text: str, shape: tuple[int, int]) -> None:
        super().__init__(text)
        self.shape = shape


def check_equal(program: Program, source: Run, names: list[str], shapes: Sequence[tuple[int, int]]) -> None:
    """The graph equals `source` at every one of `shapes` at which the source itself runs.

    Raises:
        Mismatch: it does not.
        CaptureError: the source does not run at an ordinary shape.
    """
    for batch, length in shapes:
        inputs = probe_inputs(names, batch, length, program.vocab_size or 2, program.device)
        try:
            expected = source(*inputs.values())
        except (RuntimeError, IndexError, ValueError, AssertionError) as error:
            if (batch, length) not in SHAPES:
                continue  # longer than the source's positions
            raise CaptureError(
                f"{program.model_name} itself does not run at batch {batch}, length {length} ({first_line(error)}), "
                "though it ran before at others; it may keep state from call to call, which a graph cannot hold"
            ) from error
        problem = _disagreement(program, inputs, expected)
        if problem:
            text = (
                f"the captured graph of {program.model_name} {problem} at batch {batch}, length {length}; "
                "the model's computation depends on shapes in a way that tracing lost"
            )
            raise Mismatch(text, (batch, length))


def guarded_shapes(graph: fx.Graph) -> list[tuple[int, int]]:
    """Batches and lengths at which a condition that tracing took for granted does not hold, the smallest of each: a
    scan in chunks of 64 traced at length 13 holds one chunk, and says nothing of length 65."""
    symbols: dict[Any, str] = {}
    environment: Any = None
    for node in graph.find_nodes(op="placeholder"):
        for size, what in zip(node.meta["val"].shape, ("batch", "length"), strict=True):
            if isinstance(size, torch.SymInt):
                environment = size.node.shape_env
                symbols |= {symbol: what for symbol in size.node.expr.free_symbols}
    found: set[tuple[int, int]] = set()
    for guard in environment.guards if environment is not None else ():
        violated = _first_violation(environment.simplify(guard.expr), symbols)
        if violated is not None:
            found.add(violated)
    return sorted(found)


def _first_violation(condition: Any, symbols: dict[Any, str]) -> tuple[int, int] | None:
    named = {symbols.get(symbol) for symbol in condition.free_symbols}
    if None in named or not named:
        return None
    tried = [(2, length) for length in _lengths()] if "length" in named else [(3, 14), (7, 14)]
    for batch, length in tried:
        sizes = {symbol: batch if what == "batch" else length for symbol, what in symbols.items()}
        if str(condition.subs(sizes)) == "False":
            return batch, length
    return None


def _lengths() -> list[int]:
    """Lengths on both sides of what sources use as chunk sizes, and all remainders of the small ones."""
    powers = [2**n for n in range(4, 11)]
    return [*range(2, 20), *(power + 1 for power in powers)]


def _disagreement(program: Program, inputs: dict[str, torch.Tensor], expected: torch.Tensor) -> str:
    """How the graph's logits fail to be `expected` ('' where they are)."""
    try:
        actual = program.module(*inputs.values())
    except (RuntimeError, IndexError, ValueError) as error:
        return f"does not run ({first_line(error)})"
    if actual.shape != expected.shape:
        return f"gives logits of shape {list(actual.shape)}, not {list(expected.shape)}"
    worst = relative_difference(actual, expected)
    return "" if worst <= TOLERANCE else f"differs from the model by {worst:.2g} (relative)"


def check_causal(program: Program, names: list[str], batch: int = 1, length: int = 11) -> None:
    """Later tokens do not move earlier logits.

    Raises:
        CaptureError: they do, so the model is no decoder.
    """
    inputs = probe_inputs(names, batch, length, program.vocab_size or 2, program.device)
    before = program.module(*inputs.values())
    if before.shape[1] != length:
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
