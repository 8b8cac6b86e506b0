"""Positions that a source makes for itself from 0 must start at the number of tokens already seen.

After the masks are gone, what is left of `arange(T)` and of `table[:T]` is positions: rotary angles, learned position
embeddings. Sources that take `position_ids` have neither.
"""

from __future__ import annotations

import torch
from torch import fx

from linearize.program import POSITIONS
from linearize.rewriting.editor import Editor
from linearize.rewriting.walk import is_op, shape_of

aten = torch.ops.aten
COUNTS = (aten.arange, aten.cumsum)


def offset_positions(editor: Editor, offset: fx.Node) -> int | None:
    """Shift every arange over the new tokens and every table slice up to T by `offset`.

    Returns:
        Rows of the smallest position table that is indexed, the longest context the model can run; None without one.
    """
    lengths = _length_nodes(editor.graph)
    limits = []
    for node in list(editor.graph.nodes):
        if is_op(node, aten.arange) and _end(node) in lengths:
            _shift_arange(editor, node, offset)
        elif is_op(node, aten.slice) and _is_table_slice(node, lengths):
            limits.append(_gather_table(editor, node, offset, lengths))
    limits += [limit for node in editor.graph.nodes if (limit := _embedded_positions(node)) is not None]
    return min(limits, default=None)


def _length_nodes(graph: fx.Graph) -> set[fx.Node]:
    sizes = {node for node in graph.nodes if is_op(node, aten.sym_size) and node.args[1] == 1}
    return {node for node in sizes if getattr(node.args[0], "op", "") == "placeholder"}


def _end(node: fx.Node) -> object:
    """The end of an arange that starts at 0 with step 1, else None."""
    if node.target is aten.arange.default:
        return node.args[0]
    start, end, step = (*node.args, 1)[:3]
    return end if start == 0 and step == 1 else None


def _shift_arange(editor: Editor, node: fx.Node, offset: fx.Node) -> None:
    with editor.graph.inserting_after(node):
        shifted = editor.call(aten.add.Tensor, node, offset, origin=node)
    node.replace_all_uses_with(shifted, delete_user_cb=lambda user: user is not shifted)


def _is_table_slice(node: fx.Node, lengths: set[fx.Node]) -> bool:
    table, dim = node.args[0], node.args[1] if len(node.args) > 1 else 0
    start, end = (*node.args[2:], None, None)[:2]
    size = shape_of(table)[dim] if isinstance(table, fx.Node) and shape_of(table) else None  # type: ignore[index]
    return start in (None, 0) and end in lengths and isinstance(size, int)


def _gather_table(editor: Editor, node: fx.Node, offset: fx.Node, lengths: set[fx.Node]) -> int:
    table, dim = node.args[0], int(node.args[1]) if len(node.args) > 1 else 0  # type: ignore[arg-type]
    with editor.at(node):
        rows = editor.call(aten.arange.default, node.args[3], dtype=torch.int64, device=shape_device(node))
        rows = editor.call(aten.add.Tensor, rows, offset)
        taken = editor.call(aten.index_select.default, table, dim, rows, origin=node)
    editor.replace(node, taken)
    return int(shape_of(table)[dim])  # type: ignore[arg-type]


def shape_device(node: fx.Node) -> torch.device:
    value = node.meta.get("val")
    return value.device if isinstance(value, torch.Tensor) else torch.device("cpu")


def _embedded_positions(node: fx.Node) -> int | None:
    """Positions that an embedding has rows for, where its ids are positions (an arange, a count of tokens, or the
    `position_ids` input), less the rows that the ids skip (OPT adds 2); None for an embedding of anything else."""
    if not is_op(node, aten.embedding):
        return None
    current, skipped = node.args[1], 0
    while isinstance(current, fx.Node) and current.op == "call_function" and not is_op(current, *COUNTS):
        if is_op(current, aten.where, aten.clamp, aten.minimum):
            return None  # buckets of distances, say, which have no end
        if is_op(current, aten.add, aten.sub) and isinstance(current.args[1], int):
            skipped += current.args[1] if is_op(current, aten.add) else -current.args[1]
        current = current.args[0] if current.args else None
    if isinstance(current, fx.Node) and (is_op(current, *COUNTS) or current.target == POSITIONS):
        skipped += is_op(current, aten.cumsum)  # it counts from 1
        return int(shape_of(node.args[0])[0]) - skipped  # type: ignore[arg-type]
    return None
