"""Masks by value: evaluate the mask at a probe length above every window and compare with the analytic ones.

Above `WHOLE` tokens only chosen query rows are evaluated (`rows.py`), each over all of its keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from linearize.passes.match.named_masks import MaskReading as MaskReading
from linearize.passes.match.named_masks import Probe, classify, read_slopes
from linearize.passes.match.rows import evaluate_rows
from linearize.program import MASK, POSITIONS, TOKENS, Program
from linearize.rewriting.walk import cone, evaluate, is_op, shape_of
from linearize.spec import MaskSpec

aten = torch.ops.aten
MIN_PROBE, WHOLE, MAX_PROBE = 48, 600, 1 << 21
MARGIN = 19
PADDED = 5
MASKED_BELOW = -5e3  # sources fill with -1e4, -1e9, finfo.min or -inf; position biases at a probe's length stay above
ROW_BUDGET = 1 << 21  # entries of one head's mask that are evaluated at once
COMPARISONS = (aten.lt, aten.le, aten.gt, aten.ge, aten.eq, aten.ne, aten.tril, aten.triu)
ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError, NotImplementedError)


@dataclass(frozen=True)
class _Question:
    """What is evaluated: `target`, with `product` (None for a mask of its own) as zeros of `heads` heads."""

    program: Program
    target: fx.Node
    what: str
    product: fx.Node | None = None
    heads: int = 1
    arrange: Callable[[Tensor], Tensor] | None = None


def read_mask(program: Program, mask: fx.Node | None, causal: bool, activations: set[fx.Node]) -> MaskReading:
    """Classify an SDPA mask (bool: True may attend; float: added). `causal` is the call's own flag."""
    if mask is None:
        return MaskReading(MaskSpec("causal" if causal else "full"))
    if mask in activations:
        return MaskReading(None, f"the mask {mask.name} depends on the hidden states")
    return _read(_Question(program, mask, f"the mask {mask.name}"), causal)


def read_score_mask(
    program: Program,
    scores: fx.Node,
    product: fx.Node,
    activations: set[fx.Node],
    heads: int,
    arrange: Callable[[Tensor], Tensor] | None = None,
) -> MaskReading:
    """Classify what stands between a query-key product and its softmax, whatever it is written with: evaluate the
    scores with the product set to 0, which leaves what is added or filled in. `arrange` brings the scores' value to
    [B, H, T, S]; None where they are in that order."""
    foreign = hidden_source(scores, product, activations)
    if foreign is not None:
        return MaskReading(None, f"the mask or bias {foreign.name} before the softmax depends on the hidden states")
    return _read(_Question(program, scores, f"the chain to {scores.name}", product, heads, arrange), False)


def hidden_source(scores: fx.Node, product: fx.Node, activations: set[fx.Node]) -> fx.Node | None:
    """A node that joins the chain from the product to the scores, depends on hidden states and not on the product."""
    behind = cone([scores], stop=[product])
    on_chain = {product}
    for node in sorted(behind & activations):
        if any(arg in on_chain for arg in node.all_input_nodes):
            on_chain.add(node)
    joining = [arg for node in on_chain - {product} for arg in node.all_input_nodes]
    return next((node for node in joining if node in activations and node not in on_chain), None)


def _read(question: _Question, causal: bool) -> MaskReading:
    constants = length_constants(question.target, question.product)
    length = probe_length(constants)
    if length is None:
        return MaskReading(None, f"{question.what} has a constant above {MAX_PROBE}, longer than can be probed")
    try:
        value, probe = _at_probe(question, length, constants)
        packed = _changed_by_packing(question, value, probe)
    except ERRORS as error:
        return MaskReading(None, f"{question.what} cannot be evaluated alone: {str(error).splitlines()[0]}")
    if packed:
        return MaskReading(None, f"{question.what} separates sequences packed by position_ids, which no mixer does")
    allowed, bias = split_mask(value)
    if allowed.shape[-1] != probe.length or allowed.shape[-2] != len(probe.rows):
        return MaskReading(None, f"the mask is {list(allowed.shape[-2:])} for {probe.length} tokens, not square")
    if causal:
        allowed = allowed & probe.causal
    reading = classify(allowed, probe, _has_padding(question.program))
    return _with_bias(reading, value, allowed, bias, probe, question.what)


def _at_probe(question: _Question, length: int, constants: list[int]) -> tuple[Tensor, Probe]:
    """The mask's value at the probe length, or at the constant it was chosen above where the source ends there (a
    table of biases with as many rows): no longer window can ever show."""
    probe = make_probe(length, constants)
    try:
        return _value(question, probe), probe
    except ERRORS:
        if length - MARGIN <= MIN_PROBE:
            raise
    probe = make_probe(length - MARGIN, constants)
    return _value(question, probe), probe


def make_probe(length: int, constants: list[int]) -> Probe:
    """All rows of a short probe; of a long one those at the ends and around every constant."""
    if length <= WHOLE:
        return Probe(length, torch.arange(length), PADDED, tuple(constants))
    places = [length - 1, 0, PADDED, length - 2, length // 2, 1, 2, 3, PADDED + 1]
    for constant in sorted(set(constants), reverse=True)[:12]:
        places += [constant, constant - 1, constant + 1, constant + PADDED, 2 * constant, 2 * constant - 1]
    inside = list(dict.fromkeys(place for place in places if 0 <= place < length))
    kept = sorted(inside[: max(10, ROW_BUDGET // length)])
    return Probe(length, torch.tensor(kept), PADDED, tuple(constants))


def _value(question: _Question, probe: Probe, packed: bool = False) -> Tensor:
    program = question.program
    given: dict[fx.Node, Tensor] = _inputs(program, probe.length, packed)
    whole = len(probe.rows) == probe.length
    if question.product is not None:
        rows = (len(probe.rows), probe.length)
        given[question.product] = torch.zeros(2, question.heads, *rows, dtype=question.product.meta["val"].dtype)
    value: Tensor
    if whole:
        value = evaluate(program.module, [question.target], given)[0]
    elif question.arrange is not None:
        raise ValueError(f"its scores are not laid out as [B, H, T, S], and {probe.length} tokens are too many")
    else:
        symbol = str(shape_of(_tokens(program))[1])
        value = evaluate_rows(program.module, question.target, given, probe.rows, probe.length, symbol)
    return value if question.arrange is None else question.arrange(value)


def _changed_by_packing(question: _Question, value: Tensor, probe: Probe) -> bool:
    """Whether position_ids that start again within a row change the mask."""
    stop = [] if question.product is None else [question.product]
    behind = cone([question.target], stop=stop)
    if not any(node.op == "placeholder" and node.target == POSITIONS for node in behind):
        return False
    return not torch.equal(_value(question, probe, packed=True), value)


def _with_bias(
    reading: MaskReading, value: Tensor, allowed: Tensor, bias: bool, probe: Probe, what: str
) -> MaskReading:
    """The reading with the slopes of a position-dependent bias, or refused where the bias is not linear in distance."""
    if not bias or reading.spec is None or reading.spec.kind == "other":
        return reading if not bias else replace(reading, spec=None, reason=_bias_reason(what))
    slopes = read_slopes(_rank4(value.float()), allowed, probe, _precision(value))
    if slopes is None:
        return MaskReading(None, _bias_reason(what))
    return replace(reading, alibi=slopes)


def _precision(value: Tensor) -> float:
    return 2 * torch.finfo(value.dtype).eps if value.dtype in (torch.bfloat16, torch.float16) else 0.0


def _bias_reason(what: str) -> str:
    return f"{what} adds a position-dependent bias to the scores that is not linear in the distance (ALiBi)"


def split_mask(value: Tensor) -> tuple[Tensor, bool]:
    """(bool [B, H, T, S] of what may be attended, whether the attended entries carry different additive values)."""
    if value.dtype == torch.bool:
        return _rank4(value), False
    value = _rank4(value.float())
    allowed = value > MASKED_BELOW
    seen = value[allowed]
    return allowed, bool(seen.numel()) and bool((seen - seen[0]).abs().max() > 1e-6)


def _rank4(value: Tensor) -> Tensor:
    return value.reshape((1,) * (4 - value.ndim) + tuple(value.shape))


def length_constants(target: fx.Node, stop: fx.Node | None = None) -> list[int]:
    """Every number behind the mask that could be a window or a chunk."""
    found = {
        abs(int(arg))
        for node in cone([target], stop=[stop] if stop is not None else []) - {stop}
        if _counts_tokens(node)
        for arg in (*node.args, *node.kwargs.values())
        if isinstance(arg, int | float) and not isinstance(arg, bool) and abs(arg) < 1 << 24
    }
    return sorted(found)


def _counts_tokens(node: fx.Node) -> bool:
    """Whether a number in this operator may count tokens: it compares, cuts a triangle, or computes with integers. The
    others add to scores or scale them."""
    if is_op(node, *COMPARISONS):
        return True
    inputs = [arg.meta.get("val") for arg in node.all_input_nodes]
    return any(isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32) for value in inputs)


def probe_length(constants: list[int]) -> int | None:
    """Longer than every length-like constant, so that windows and chunks show; None if that is too long."""
    longest = max(constants, default=0)
    if longest <= MIN_PROBE:
        return max(MIN_PROBE, 2 * longest + 3)
    return longest + MARGIN if longest + MARGIN <= MAX_PROBE else None


def _inputs(program: Program, length: int, packed: bool) -> dict[fx.Node, Tensor]:
    """Row 0 without padding, row 1 with the first PADDED positions masked out; all on the CPU."""
    ids = torch.zeros(2, length, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, :PADDED] = 0
    places = torch.arange(length) % (length // 2) if packed else torch.arange(length)
    made = {TOKENS: ids, MASK: mask, POSITIONS: places.expand(2, length).contiguous()}
    return {node: made[str(node.target)] for node in program.placeholders()}


def _tokens(program: Program) -> fx.Node:
    return next(node for node in program.placeholders() if node.target == TOKENS)


def _has_padding(program: Program) -> bool:
    return MASK in program.input_names()
