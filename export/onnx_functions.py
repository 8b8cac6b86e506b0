"""Operators of ours that ONNX can say with control flow, which torch.export cannot: they stand as one node until the
graph is translated, and are then written out.

    grouped_mm    Loop over the groups, of those that have rows a product; the matrices of the others are not touched
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from linearize.export.names import OPSET
from linearize.ops import grouped_mm

if TYPE_CHECKING:
    import onnx_ir as ir

DOMAIN = "linearize"

# x [S,n], weight [E,n,m] (or [E,m,n], transB = 1), ends [E] -> y [S,m]; the rows of a group come one after another
GROUPED_MM = """
<domain: "linearize", opset_import: ["" : {opset}]>
{name} <transposed> (x, weight, ends) => (y) {{
    zero = Constant <value = int64[1] {{0}}> ()
    one = Constant <value = int64[1] {{1}}> ()
    before_last = Constant <value = int64[1] {{-1}}> ()
    always = Constant <value = bool {{1}}> ()
    columns = Shape <start = {columns}, end = {columns_end}> (weight)
    groups = Shape <start = 0, end = 1> (weight)
    count = Squeeze (groups, zero)
    ends_64 = Cast <to = 7> (ends)
    all_but_last = Slice (ends_64, zero, before_last, zero)
    starts = Concat <axis = 0> (zero, all_but_last)
    empty_shape = Concat <axis = 0> (zero, columns)
    empty = ConstantOfShape (empty_shape)
    products = Loop (count, always, empty) <body = one_group (int64 group, bool go, float[r, m] sofar)
        => (bool go_on, float[s, m] grown) {{
        start = Gather <axis = 0> (starts, group)
        end = Gather <axis = 0> (ends_64, group)
        has_rows = Greater (end, start)
        grown = If (has_rows) <then_branch = some () => (float[s, m] more) {{
            first = Unsqueeze (start, zero)
            last = Unsqueeze (end, zero)
            rows = Slice (x, first, last, zero)
            matrix = Gather <axis = 0> (weight, group)
            product = Gemm <transB: int = @transposed> (rows, matrix)
            more = Concat <axis = 0> (sofar, product)
        }}, else_branch = none () => (float[r, m] same) {{
            same = Identity (sofar)
        }}>
        go_on = Identity (go)
    }}>
    all_rows = Shape <start = 0, end = 1> (x)
    grouped_rows = Shape <start = 0, end = 1> (products)
    rest = Sub (all_rows, grouped_rows)
    rest_shape = Concat <axis = 0> (rest, columns)
    zeros = ConstantOfShape (rest_shape)
    y = Concat <axis = 0> (products, zeros)
}}
"""


def grouped_mm_node(x: Tensor, weight: Tensor, ends: Tensor, *, transposed: bool = False) -> Tensor:
    """The node that `write_out` replaces. Only while exporting: run eagerly it would give zeros."""
    shape = (x.shape[0], weight.shape[1 if transposed else 2])
    given: dict[str, Any] = {"transposed": int(transposed)}
    (found,) = torch.onnx.ops.symbolic_multi_out(
        f"{DOMAIN}::{_name(transposed)}", [x, weight, ends], given, dtypes=[torch.float32], shapes=[shape], version=1
    )
    return found


FORMS = {grouped_mm: grouped_mm_node}


def write_out(model: ir.Model) -> None:
    """Put what the nodes of the domain `linearize` compute in their place."""
    import onnx
    import onnx_ir as ir
    from onnx_ir.passes.common import InlinePass

    used = {node.op_type for node in model.graph if node.domain == DOMAIN}
    for transposed in (False, True):
        name = _name(transposed)
        if name in used:
            columns = 1 if transposed else 2
            text = GROUPED_MM.format(opset=OPSET, name=name, columns=columns, columns_end=columns + 1)
            function = ir.serde.deserialize_function(onnx.parser.parse_function(text))
            model.functions[function.identifier()] = function
    if used:
        InlinePass()(model)
        model.opset_imports.pop(DOMAIN, None)


def _name(transposed: bool) -> str:
    return "GroupedMMTransposed" if transposed else "GroupedMM"
