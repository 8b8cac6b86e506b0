"""Softmax written by hand becomes `softmax`, and every softmax runs over the last dim.

    exp(x - amax(x)) / sum(exp(x - amax(x))),  exp(x) / sum(exp(x)),  exp(x - logsumexp(x)),  exp(log_softmax(x))
    softmax(x, k) -> transpose(softmax(transpose(x, k, -1), -1), k, -1)                        for k not the last dim

What is subtracted cancels, so it need not be the maximum: any tensor that is constant along the dim will do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from linearize.passes.normalise.spell_einsums import call
from linearize.pipeline import Keeps, Stage
from linearize.program import Program, op_name
from linearize.rewriting.editor import Editor
from linearize.rewriting.walk import is_op, shape_of

aten = torch.ops.aten
PEAKS = (aten.amax, aten.max, aten.logsumexp, aten.mean)


@dataclass(frozen=True)
class SpellSoftmax:
    name: ClassVar[str] = "spell_softmax"
    stage: ClassVar[Stage] = Stage.NORMALISE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        if not any(is_op(node, aten.exp) or _over_another_dim(node) for node in program.graph.nodes):
            return program
        module = program.copy_graph()
        editor = Editor(module, self.name)
        for node in list(module.graph.nodes):
            with editor.at(node):
                new = _spelled(editor, node)
            if new is not None:
                editor.replace(node, new)
        return program.replace(module=editor.finish())


def _spelled(editor: Editor, node: fx.Node) -> fx.Node | None:
    if _over_another_dim(node):
        scores, dim, *rest = list[Any](node.args)
        return _last_dim(editor, node, scores, dim, tuple(rest))
    found = read_softmax(node)
    return _last_dim(editor, node, *found, ()) if found is not None else None


def _over_another_dim(node: fx.Node) -> bool:
    rank = len(shape_of(node))
    dim: Any = node.args[1] if len(node.args) > 1 else -1
    return is_op(node, aten.softmax, aten._softmax) and rank >= 3 and dim % rank != rank - 1


def _last_dim(editor: Editor, node: fx.Node, scores: Any, dim: int, rest: tuple[Any, ...]) -> fx.Node:
    target: Any = node.target if is_op(node, aten.softmax, aten._softmax) else aten.softmax.int
    rank = len(shape_of(scores))
    if dim % rank == rank - 1:
        return call(editor, node, target, scores, -1, *rest)
    turned = call(editor, node, aten.transpose.int, scores, dim, -1)
    return call(editor, node, aten.transpose.int, call(editor, node, target, turned, -1, *rest), dim, -1)


def read_softmax(node: fx.Node) -> tuple[fx.Node, int] | None:
    """(What is normalised, over which dim) if `node` is the last step of a softmax written by hand."""
    if is_op(node, aten.exp):
        return _of_logarithm(node.args[0])
    if not is_op(node, aten.div) or len(node.args) != 2:
        return None
    weights, total = node.args
    if not is_op(weights, aten.exp) or not is_op(total, aten.sum) or total.args[0] is not weights:  # type: ignore[union-attr]
        return None
    dim = _single_dim(total)
    inner: Any = weights.args[0]  # type: ignore[union-attr]
    return None if dim is None else (_without_peak(inner, dim), dim)


def _of_logarithm(node: Any) -> tuple[fx.Node, int] | None:
    if is_op(node, aten.log_softmax, aten._log_softmax):
        return node.args[0], node.args[1]
    if is_op(node, aten.sub) and is_op(node.args[1], aten.logsumexp) and node.args[1].args[0] is node.args[0]:
        dim = _single_dim(node.args[1])
        return None if dim is None else (node.args[0], dim)
    return None


def _single_dim(node: Any) -> int | None:
    """The one dim that a reduction with `keepdim` runs over."""
    dims, keepdim = (*node.args[1:], None, None)[:2]
    dims = [dims] if isinstance(dims, int) else dims
    return int(dims[0]) if keepdim is True and isinstance(dims, list | tuple) and len(dims) == 1 else None


def _without_peak(node: Any, dim: int) -> fx.Node:
    """x of `x - m`, where m is a number along `dim`."""
    if is_op(node, aten.sub) and isinstance(node.args[1], fx.Node):
        peak = node.args[1]
        source = peak.args[0] if op_name(peak) == "getitem" else peak
        if is_op(source, *PEAKS) and shape_of(peak)[dim] == 1:
            return node.args[0]  # type: ignore[no-any-return]
    return node  # type: ignore[no-any-return]
