"""The masks that have a name, compared by value with what was read at chosen query rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.spec import MaskSpec


@dataclass(frozen=True)
class Probe:
    """A mask was read for `rows` of `length` queries over all keys; row 1 of the batch had its first `padded` tokens
    masked out. `constants` are numbers of the graph that may be windows or chunks."""

    length: int
    rows: Tensor
    padded: int = 5
    constants: tuple[int, ...] = ()

    @property
    def row(self) -> Tensor:
        return self.rows[:, None]

    @property
    def column(self) -> Tensor:
        return torch.arange(self.length)[None, :]

    @property
    def causal(self) -> Tensor:
        return self.column <= self.row

    def sliding(self, size: int) -> Tensor:
        return self.causal & (self.column > self.row - size)

    def chunked(self, size: int, start: int = 0) -> Tensor:
        same = (self.column - start) // size == (self.row - start) // size
        return self.causal & same


@dataclass(frozen=True)
class MaskReading:
    """What a mask is, or why it could not be read (`reason`)."""

    spec: MaskSpec | None
    reason: str = ""
    alibi: tuple[float, ...] = ()


def classify(allowed: Tensor, probe: Probe, padded: bool) -> MaskReading:
    """Name the mask bool [B, H, rows, S]; with `padded` its row 1, if there is one, had its first tokens masked out."""
    if allowed.shape[1] > 1 and not bool((allowed == allowed[:, :1]).all()):
        return MaskReading(None, "the mask differs between heads")
    base = allowed[0, 0]
    if base.shape != (len(probe.rows), probe.length):
        return MaskReading(None, f"the mask is {list(base.shape)}, not square")
    spec = name_mask(base, probe)
    if spec is None:
        return MaskReading(MaskSpec("other", detail=describe(base, probe)), f"unknown mask: {describe(base, probe)}")
    if not padded or allowed.shape[0] < 2:
        return MaskReading(spec)
    return _check_padding(allowed[1, 0], base, spec, probe)


def name_mask(base: Tensor, probe: Probe) -> MaskSpec | None:
    """The mask bool [rows, S] as one of the kinds of `MaskSpec`, or None."""
    if bool(base.all()):
        return MaskSpec("full")
    if torch.equal(base, probe.causal):
        return MaskSpec("causal")
    reach = _longest_reach(base, probe)
    if reach and torch.equal(base, probe.sliding(reach)):
        return MaskSpec("sliding", reach)
    for size in _chunk_sizes(base, probe):
        if torch.equal(base, probe.chunked(size)):
            return MaskSpec("chunked", size)
    prefix = _prefix(base, probe)
    if prefix and torch.equal(base, probe.causal | (probe.column < prefix)):
        return MaskSpec("prefix", prefix)
    return None


def _longest_reach(base: Tensor, probe: Probe) -> int:
    """Keys from the first that the last row sees up to itself."""
    seen = base[-1].nonzero()
    return int(probe.rows[-1]) - int(seen[0]) + 1 if len(seen) else 0


def _chunk_sizes(base: Tensor, probe: Probe) -> list[int]:
    """Where key 0 is first hidden, and every constant."""
    hidden = (~base[:, 0]).nonzero()
    first = [int(probe.rows[int(hidden[0])])] if len(hidden) else []
    return [size for size in dict.fromkeys([*first, *probe.constants]) if 1 < size < probe.length]


def _prefix(base: Tensor, probe: Probe) -> int:
    """Keys that row 0 sees, itself included, if it sees later ones."""
    return int(base[0].sum()) if int(probe.rows[0]) == 0 and int(base[0].sum()) > 1 else 0


def describe(base: Tensor, probe: Probe) -> str:
    """An unnamed mask in words: an intersection or union of named ones, or how it differs from the causal mask."""
    combined = _combination(base, probe)
    if combined:
        return combined
    outside, missing = int((base & ~probe.causal).sum()), int((probe.causal & ~base).sum())
    at = f"at length {probe.length}"
    if len(probe.rows) != probe.length:
        at += f", in {len(probe.rows)} rows,"
    return f"{at} it shows {outside} future keys and hides {missing} past ones"


def _combination(base: Tensor, probe: Probe) -> str:
    reach = max((int(probe.rows[i]) - int(seen[0]) + 1 for i, seen in _seen(base)), default=0)
    for size in _chunk_sizes(base, probe):
        if reach and torch.equal(base, probe.sliding(reach) & probe.chunked(size)):
            return f"the intersection of sliding({reach}) and chunked({size}), which no mixer computes"
    kept = _always_seen(base, probe)
    for size in (*probe.constants, *range(1, min(probe.length, 64))):
        if kept and torch.equal(base, probe.sliding(size) | (probe.causal & (probe.column < kept))):
            return f"sliding({size}) with the first {kept} keys always seen"
    return ""


def _seen(base: Tensor) -> list[tuple[int, Tensor]]:
    return [(i, seen) for i in range(len(base)) if len(seen := base[i].nonzero())]


def _always_seen(base: Tensor, probe: Probe) -> int:
    """First keys that the last row sees without a gap."""
    hidden = (~base[-1]).nonzero()
    return int(hidden[0]) if len(hidden) else 0


def _check_padding(row: Tensor, base: Tensor, spec: MaskSpec, probe: Probe) -> MaskReading:
    if torch.equal(row, base):
        return MaskReading(spec)
    moved = spec.kind == "chunked" and not _hides_padding(row, base, probe)
    if not _hides_padding(row, probe.chunked(spec.size, probe.padded) if moved else base, probe):
        return MaskReading(None, "padding changes the mask in another way than hiding the padded keys")
    if spec.kind == "chunked" and probe.padded % spec.size == 0 and spec.size > 1:
        return MaskReading(
            None, f"whether padding moves chunks of {spec.size} cannot be told from {probe.padded} padded keys"
        )
    return MaskReading(MaskSpec(spec.kind, spec.size, padding=True, from_first_token=moved))


def _hides_padding(row: Tensor, base: Tensor, probe: Probe) -> bool:
    expected = base.clone()
    expected[:, : probe.padded] = False
    real = probe.rows >= probe.padded  # rows of padding themselves are nobody's business
    return torch.equal(row[real], expected[real])


def read_slopes(value: Tensor, allowed: Tensor, probe: Probe, precision: float = 0.0) -> tuple[float, ...] | None:
    """ALiBi's slope per head if, up to a constant per query, `value` [B, H, rows, S] is slope_h j wherever `allowed`;
    None otherwise. Rows of padding are nobody's business. `precision` is the values' own, relative."""
    value, allowed = (tensor.expand(-1, value.shape[1], -1, -1) for tensor in (value, allowed))
    seen = allowed[0, 0, -1].nonzero()
    if value.shape[-2] != len(probe.rows) or len(seen) < 2:
        return None
    low, high = int(seen[0]), int(seen[-1])
    slopes = (value[0, :, -1, high] - value[0, :, -1, low]) / (high - low)
    rest = (value - slopes[:, None, None] * torch.arange(probe.length)).masked_fill(~allowed, float("nan"))
    tolerance = max(1e-5, precision) * (1 + slopes.abs()[:, None] * probe.length)
    for row, real in ((0, probe.rows >= 0), (value.shape[0] - 1, probe.rows >= (value.shape[0] > 1) * probe.padded)):
        each = rest[row][:, real]
        spread = each.nan_to_num(nan=float("-inf")).amax(-1) - each.nan_to_num(nan=float("inf")).amin(-1)
        if not bool((spread <= tolerance).all()):
            return None
    return tuple(float(slope) for slope in slopes)
