"""`linearize::grouped_mm`, every row times the matrix of its group: the experts of a mixture.

    y_i = x_i W_{e(i)},   e(i) = the number of ends that are <= i

x [S,n], sorted by group; weight [E,n,m], or [E,m,n] with `transposed`; ends [E] integers, the first row behind each
group, never decreasing. Rows behind the last end give 0. y [S,m] in the dtype of x.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._guards import detect_fake_mode
from torch.fx.experimental.symbolic_shapes import statically_known_true

from linearize.ops._library import define_operator, require

SCHEMA = "grouped_mm(Tensor x, Tensor weight, Tensor ends, *, bool transposed=False) -> Tensor y"


def grouped_mm_recurrence(x: Tensor, weight: Tensor, ends: Tensor, *, transposed: bool = False) -> Tensor:
    """The truth: one row at a time."""
    weight, rows = _columns_last(weight, transposed), []
    for row, group in zip(x, _groups(x, ends).tolist(), strict=True):
        rows.append(row @ weight[group] if group < len(weight) else row.new_zeros(weight.shape[2]))
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[2])


def grouped_mm_decomposed(x: Tensor, weight: Tensor, ends: Tensor, *, transposed: bool = False) -> Tensor:
    """Standard operators. Few rows, known to be so, gather their matrices; others are multiplied by all, and choose."""
    weight, groups = _columns_last(weight, transposed), _groups(x, ends)
    known = (groups < weight.shape[0]).unsqueeze(-1).to(x.dtype)
    groups = groups.clamp(max=weight.shape[0] - 1)
    if statically_known_true(x.shape[0] <= weight.shape[0] // 2):
        return torch.bmm(x.unsqueeze(1), weight[groups]).squeeze(1) * known
    products = torch.matmul(x, weight)  # [E,S,m]
    index = groups.reshape(1, -1, 1).expand(1, -1, weight.shape[2])
    return products.gather(0, index).squeeze(0) * known


def grouped_mm_by_group(x: Tensor, weight: Tensor, ends: Tensor, *, transposed: bool = False) -> Tensor:
    """One product a group that has rows. Asks the device for the ends, except in bfloat16 on a GPU; while a gradient is
    traced there are none to ask for."""
    if detect_fake_mode([ends]) is not None:
        return grouped_mm_decomposed(x, weight, ends, transposed=transposed)
    weight = _columns_last(weight, transposed)
    if x.is_cuda and x.dtype == torch.bfloat16 and hasattr(torch.nn.functional, "grouped_mm"):
        found: Tensor = torch.nn.functional.grouped_mm(x, weight, offs=ends.to(torch.int32))
        return found.masked_fill((_groups(x, ends) >= weight.shape[0]).unsqueeze(-1), 0.0)
    parts, start = [], 0
    for group, end in enumerate(ends.tolist()):
        if end > start:
            parts.append(x[start:end] @ weight[group])
        start = end
    parts.append(x.new_zeros(x.shape[0] - start, weight.shape[2]))
    return torch.cat(parts)


def _columns_last(weight: Tensor, transposed: bool) -> Tensor:
    return weight.mT if transposed else weight


def _groups(x: Tensor, ends: Tensor) -> Tensor:
    """e(i) [S]."""
    return (torch.arange(x.shape[0], device=x.device).unsqueeze(1) >= ends).sum(1)


def _fake(x: Tensor, weight: Tensor, ends: Tensor, *, transposed: bool = False) -> Tensor:
    weight = _columns_last(weight, transposed)
    require(x.ndim == 2 and weight.ndim == 3, "grouped_mm", f"x has rank {x.ndim}, weight {weight.ndim}; not 2 and 3")
    require(x.shape[1] == weight.shape[1], "grouped_mm", f"x has {x.shape[1]} columns, weight {weight.shape[1]} rows")
    require(ends.shape == weight.shape[:1], "grouped_mm", f"{ends.numel()} ends for {weight.shape[0]} matrices")
    return x.new_empty(x.shape[0], weight.shape[2])


GROUPED_MM = define_operator(
    SCHEMA,
    fake=_fake,
    reference=grouped_mm_decomposed,
    recurrence=grouped_mm_recurrence,
    streamed=grouped_mm_by_group,
    composed=grouped_mm_by_group,
)
grouped_mm = GROUPED_MM.overload
