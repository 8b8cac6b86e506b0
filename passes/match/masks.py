"""Masks by value: evaluate the mask at a probe length above every window and compare with the analytic ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import fx

from linearize.program import MASK, POSITIONS, TOKENS, Program
from linearize.rewriting.walk import cone, evaluate
from linearize.spec import MaskSpec

MIN_PROBE, MAX_PROBE = 48, 8200
MARGIN = 19
PADDED = 5
MASKED_BELOW = -5e3  # sources fill with -1e4, -1e9, finfo.min or -inf; position biases at a probe's length stay above


@dataclass(frozen=True)
class MaskReading:
    """What a mask is, or why it could not be read (`reason`)."""

    spec: MaskSpec | None
    reason: str = ""
    alibi: tuple[float, ...] = ()


def read_mask(program: Program, mask: fx.Node | None, causal: bool, activations: set[fx.Node]) -> MaskReading:
    """Classify an SDPA mask (bool: True may attend; float: added). `causal` is the call's own flag."""
    if mask is None:
        return MaskReading(MaskSpec("causal" if causal else "full"))
    if mask in activations:
        return MaskReading(None, f"the mask {mask.name} depends on the hidden states")
    length = probe_length(mask)
    if length is None:
        return MaskReading(None, f"the mask {mask.name} has a constant above {MAX_PROBE}, longer than can be probed")
    try:
        value = _at_probe(length, lambda at: evaluate(program.module, [mask], _padded_inputs(program, at))[0])
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        return MaskReading(None, f"the mask {mask.name} cannot be evaluated alone: {str(error).splitlines()[0]}")
    allowed, bias = split_mask(value)
    length = allowed.shape[-1]
    if causal:
        allowed = allowed & torch.ones(length, length, dtype=torch.bool).tril()
    return _with_bias(classify(allowed, padded=_has_padding(program)), value, allowed, bias, f"the mask {mask.name}")


def read_score_mask(
    program: Program, scores: fx.Node, product: fx.Node, activations: set[fx.Node], heads: int
) -> MaskReading:
    """Classify what stands between a query-key product and its softmax, whatever it is written with: evaluate the
    scores with the product set to 0, which leaves what is added or filled in."""
    length = probe_length(scores, stop=product)
    if length is None:
        return MaskReading(None, f"the chain to {scores.name} has a constant above {MAX_PROBE}, too long to probe")

    def at_length(length: int) -> torch.Tensor:
        zeros = torch.zeros(2, heads, length, length, dtype=product.meta["val"].dtype)
        return evaluate(program.module, [scores], {**_padded_inputs(program, length), product: zeros})[0]

    try:
        value = _at_probe(length, at_length)
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError) as error:
        return MaskReading(None, f"the chain to {scores.name} cannot be evaluated alone: {str(error).splitlines()[0]}")
    if value.ndim == 3 and value.shape[0] == 2 * heads:  # batch and heads merged
        value = value.unflatten(0, (2, heads))
    allowed, bias = split_mask(value)
    return _with_bias(
        classify(allowed, padded=_has_padding(program)), value, allowed, bias, f"the chain to {scores.name}"
    )


def _at_probe(length: int, read: Callable[[int], torch.Tensor]) -> torch.Tensor:
    """The mask's value at the probe length, or at the constant it was chosen above where the source ends there (a
    table of biases with as many rows): no longer window can ever show."""
    try:
        return read(length)
    except (RuntimeError, IndexError):
        if length - MARGIN <= MIN_PROBE:
            raise
        return read(length - MARGIN)


def _with_bias(reading: MaskReading, value: torch.Tensor, allowed: torch.Tensor, bias: bool, what: str) -> MaskReading:
    """The reading with the slopes of a position-dependent bias, or refused where the bias is not linear in distance."""
    if not bias or reading.spec is None or reading.spec.kind == "other":
        return reading if not bias else replace(reading, spec=None, reason=_bias_reason(what))
    slopes = read_slopes(_rank4(value.float()), allowed)
    if slopes is None:
        return MaskReading(None, _bias_reason(what))
    return replace(reading, alibi=slopes)


def _bias_reason(what: str) -> str:
    return f"{what} adds a position-dependent bias to the scores that is not linear in the distance (ALiBi)"


def read_slopes(value: torch.Tensor, allowed: torch.Tensor) -> tuple[float, ...] | None:
    """ALiBi's slope per head if, up to a constant per query, `value` [B, H, T, S] is slope_h j wherever `allowed`;
    None otherwise. Rows of padding are nobody's business."""
    value, allowed = (tensor.expand(-1, value.shape[1], -1, -1) for tensor in (value, allowed))
    last, length = value[0, :, -1], value.shape[-1]
    low = length - int(allowed[0, 0, -1].sum())
    if value.shape[-2] != length or length - low < 2:
        return None
    slopes = (last[:, -1] - last[:, low]) / (length - 1 - low)
    rest = (value - slopes[:, None, None] * torch.arange(length)).masked_fill(~allowed, float("nan"))
    start = PADDED if value.shape[0] > 1 else 0
    for row, first in ((0, 0), (value.shape[0] - 1, start)):
        each = rest[row, :, first:]
        spread = each.nan_to_num(nan=float("-inf")).amax(-1) - each.nan_to_num(nan=float("inf")).amin(-1)
        if not bool((spread <= 1e-5 * (1 + slopes.abs()[:, None] * length)).all()):
            return None
    return tuple(float(slope) for slope in slopes)


def split_mask(value: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """(bool [B, H, T, S] of what may be attended, whether the attended entries carry different additive values)."""
    if value.dtype == torch.bool:
        return _rank4(value), False
    value = _rank4(value.float())
    allowed = value > MASKED_BELOW
    seen = value[allowed]
    return allowed, bool(seen.numel()) and bool((seen - seen[0]).abs().max() > 1e-6)


def _rank4(value: torch.Tensor) -> torch.Tensor:
    return value.reshape((1,) * (4 - value.ndim) + tuple(value.shape))


def probe_length(mask: fx.Node, stop: fx.Node | None = None) -> int | None:
    """Longer than every length-like constant behind the mask, so that windows and chunks show; None if too long."""
    constants = [
        abs(int(arg))
        for node in cone([mask], stop=[stop] if stop is not None else []) - {stop}
        for arg in (*node.args, *node.kwargs.values())
        if isinstance(arg, int | float) and not isinstance(arg, bool) and abs(arg) < 1e9
    ]
    longest = max([constant for constant in constants if constant < 1 << 24], default=0)
    if longest <= MIN_PROBE:
        return max(MIN_PROBE, 2 * longest + 3)
    return longest + MARGIN if longest + MARGIN <= MAX_PROBE else None


def _padded_inputs(program: Program, length: int) -> dict[fx.Node, torch.Tensor]:
    """Row 0 without padding, row 1 with the first PADDED positions masked out; all on the CPU."""
    ids = torch.zeros(2, length, dtype=torch.int64)
    mask = torch.ones_like(ids)
    mask[1, :PADDED] = 0
    made = {TOKENS: ids, MASK: mask, POSITIONS: torch.arange(length).expand(2, length).contiguous()}
    return {node: made[str(node.target)] for node in program.placeholders()}


def _has_padding(program: Program) -> bool:
    return MASK in program.input_names()


def classify(allowed: torch.Tensor, padded: bool) -> MaskReading:
    """Name the mask bool [B, H, T, S], whose row 1 (if there is one and `padded`) had its first tokens masked out."""
    if allowed.shape[1] > 1 and not bool((allowed == allowed[:, :1]).all()):
        return MaskReading(None, "the mask differs between heads")
    base = allowed[0, 0]
    if base.shape[0] != base.shape[1]:
        return MaskReading(None, f"the mask is {list(base.shape)}, not square")
    spec = _name(base)
    if spec is None:
        return MaskReading(MaskSpec("other", detail=_describe(base)), f"unknown mask: {_describe(base)}")
    if not padded or allowed.shape[0] < 2:
        return MaskReading(spec)
    return _check_padding(allowed[1, 0], base, spec)


def _check_padding(row: torch.Tensor, base: torch.Tensor, spec: MaskSpec) -> MaskReading:
    if torch.equal(row, base):
        return MaskReading(spec)
    moved = spec.kind == "chunked" and not _hides_padding(row, base)
    if not _hides_padding(row, _padded_chunks(base, spec.size) if moved else base):
        return MaskReading(None, "padding changes the mask in another way than hiding the padded keys")
    if spec.kind == "chunked" and PADDED % spec.size == 0 and spec.size > 1:
        return MaskReading(
            None, f"whether padding moves chunks of {spec.size} cannot be told from {PADDED} padded keys"
        )
    return MaskReading(MaskSpec(spec.kind, spec.size, padding=True, from_first_token=moved))


def _hides_padding(row: torch.Tensor, base: torch.Tensor) -> bool:
    expected = base.clone()
    expected[:, :PADDED] = False
    return torch.equal(row[PADDED:], expected[PADDED:])  # rows of padding themselves are nobody's business


def _padded_chunks(base: torch.Tensor, size: int) -> torch.Tensor:
    """Chunks counted from the row's first real token."""
    token = torch.arange(base.shape[0]) - PADDED
    return base.new_ones(base.shape).tril() & (token[:, None] // size == token[None, :] // size)


def _name(base: torch.Tensor) -> MaskSpec | None:
    length = base.shape[0]
    row, column = torch.arange(length)[:, None], torch.arange(length)[None, :]
    if bool(base.all()):
        return MaskSpec("full")
    causal = column <= row
    if torch.equal(base, causal):
        return MaskSpec("causal")
    hidden = (~base[:, 0]).nonzero()
    size = int(hidden[0]) if len(hidden) else 0
    if size and torch.equal(base, causal & (column > row - size)):
        return MaskSpec("sliding", size)
    if size and torch.equal(base, causal & (column // size == row // size)):
        return MaskSpec("chunked", size)
    return None


def _describe(base: torch.Tensor) -> str:
    length = base.shape[0]
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    outside = int((base & ~causal).sum())
    missing = int((causal & ~base).sum())
    return f"at length {length} it shows {outside} future keys and hides {missing} past ones"
