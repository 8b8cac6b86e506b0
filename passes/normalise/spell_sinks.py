"""A gate by the size of the scores becomes a logit in the denominator, which is what it is (Granite's sinks).

    softmax(s) v  sigmoid(logsumexp(s) - r) = sum_j e^{s_j} v_j / (sum_j e^{s_j} + e^r) = softmax([s, r])[..., :-1] v

since softmax(s) sigmoid(l - r) = e^{s - l} e^l / (e^l + e^r) with l = logsumexp(s). Shapes: s [B,H,T,S], r [1,H,1].
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import fx

from linearize.passes.normalise.spell_einsums import call
from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import Editor
from linearize.rewriting.walk import is_op, shape_of

aten = torch.ops.aten


class Gated(NamedTuple):
    """The nodes of one gated attention: scores [B,H,T,S], their softmax, the product with values, r [1,H,1]."""

    scores: fx.Node
    softmax: fx.Node
    product: fx.Node
    sink: fx.Node


@dataclass(frozen=True)
class SpellSinks:
    name: ClassVar[str] = "spell_sinks"
    stage: ClassVar[Stage] = Stage.NORMALISE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        if not any(is_op(node, aten.logsumexp) for node in program.graph.nodes):
            return program
        module = program.copy_graph()
        editor = Editor(module, self.name)
        for node in list(module.graph.nodes):
            gated = read_gated(node)
            if gated is not None:
                with editor.at(node):
                    editor.replace(node, _with_sinks(editor, node, gated))
        return program.replace(module=editor.finish())


def read_gated(node: fx.Node) -> Gated | None:
    """The parts of `product * unsqueeze(sigmoid(logsumexp(scores) - sink), -1)`, in either order of the factors."""
    if not is_op(node, aten.mul) or len(node.args) != 2:
        return None
    for product, gate in (node.args, node.args[::-1]):
        product, weights = _product(product)
        outer: Any = gate
        sigmoid: Any = outer.args[0] if is_op(outer, aten.unsqueeze) and outer.args[1] in (-1, 3) else None
        inner: Any = sigmoid.args[0] if is_op(sigmoid, aten.sigmoid) else None
        if product is None or not is_op(inner, aten.sub):
            continue
        size, sink = inner.args[:2]
        scores = weights.args[0]
        over_keys = is_op(size, aten.logsumexp) and size.args[0] is scores and list(size.args[1]) in ([-1], [3])
        shape = shape_of(sink) if isinstance(sink, fx.Node) else ()
        if over_keys and len(size.args) == 2 and len(shape_of(scores)) == 4 and shape == (1, shape_of(scores)[1], 1):
            return Gated(scores, weights, product, sink)
    return None


def _product(node: Any) -> tuple[Any, Any]:
    """(The product of weights and values, the softmax over keys that its left operand is), or (None, None)."""
    weights: Any = node.args[0] if is_op(node, aten.matmul) else None
    if not is_op(weights, aten.softmax) or weights.args[1] not in (-1, 3):
        return None, None
    return node, weights


def _with_sinks(editor: Editor, node: fx.Node, gated: Gated) -> fx.Node:
    batch, length = (call(editor, node, aten.sym_size.int, gated.scores, dim) for dim in (0, 2))
    sink = call(editor, node, aten.unsqueeze.default, gated.sink, -1)
    sink = call(editor, node, aten.expand.default, sink, [batch, -1, length, -1])
    joined = call(editor, node, aten.cat.default, [gated.scores, sink], -1)
    target: Any = gated.softmax.target
    weights = call(editor, node, target, joined, -1, *gated.softmax.args[2:])
    kept = call(editor, node, aten.slice.Tensor, weights, -1, 0, -1)
    return call(editor, node, aten.matmul.default, kept, gated.product.args[1])
