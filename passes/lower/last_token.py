"""The program of a prompt: logits of its last token alone, [B, 1, V].

Behind the last mixer every token is in the state, so the rest of the last layer and the output layer serve the logits
alone, and of a prompt only the last are read. In a model of 1B parameters with a vocabulary of 128k the output layer is
a fifth of the operations, and its logits are what a piece of a prompt costs in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import Editor
from linearize.rewriting.walk import MAX_INDEX, is_op
from linearize.verify import logits_node, shapes_at

aten = torch.ops.aten
LENGTHS = (13, 17)  # a dim that follows both is the tokens', whatever else has 13
OF_FIRST = (aten.linear, aten.matmul, aten.to, aten._to_copy, aten.clone, aten.contiguous, aten.alias, aten.dropout)
OVER_DIMS = (aten.mean, aten.sum, aten.softmax, aten._softmax, aten.log_softmax)
NORMS = (aten.layer_norm, aten.rms_norm)
LINEARS = ("Linear", "Conv1D")


@dataclass(frozen=True)
class LastToken:
    """Cuts what the logits alone read to its last token, as early as it is computed token by token."""

    name: ClassVar[str] = "last_token"
    stage: ClassVar[Stage] = Stage.LOWER
    keeps: ClassVar[Keeps] = Keeps.LOSSY  # the other tokens' logits are gone

    def run(self, program: Program) -> Program:
        module = program.copy_graph()
        tokens = Tokens.of(program.replace(module=module))
        region, editor = tokens.region(), Editor(module, self.name)
        if not region:
            _cut_output(editor)
        for node in [node for node in module.graph.nodes if node not in region and tokens.has(node)]:
            users = [user for user in node.users if user in region]
            last = _last(editor, node) if users else node
            for user in users:
                user.replace_input_with(node, last)
        for node in region:
            node.meta.pop("val", None)  # it has one token now
        return program.replace(module=editor.finish())


def _last(editor: Editor, node: fx.Node) -> fx.Node:
    with editor.graph.inserting_after(node):
        return editor.call(aten.slice.Tensor, node, 1, -1, MAX_INDEX)


def _cut_output(editor: Editor) -> None:
    output = next(iter(reversed(editor.graph.nodes)))
    last = _last(editor, logits_node(editor.graph))
    outputs: Any = output.args[0]
    output.args = ([last, *outputs[1:]] if isinstance(outputs, list | tuple) else last,)


@dataclass(frozen=True)
class Tokens:
    """Which nodes of a graph are [B, T, ...], and which of those are computed token by token."""

    module: fx.GraphModule
    lengths: tuple[int, ...]
    shapes: tuple[dict[fx.Node, tuple[int, ...]], ...]  # at each of the lengths

    @staticmethod
    def of(program: Program) -> Tokens:
        lengths = LENGTHS if program.max_positions is None else (2, min(LENGTHS[0], program.max_positions))
        return Tokens(program.module, lengths, tuple(shapes_at(program, 2, length) for length in lengths))

    def region(self) -> set[fx.Node]:
        """The nodes that the logits alone need, back to where a token depends on more than itself."""
        graph, region = self.module.graph, set[fx.Node]()
        logits, output = logits_node(graph), next(iter(reversed(graph.nodes)))
        outputs: Any = output.args[0]
        if isinstance(outputs, list | tuple) and logits in outputs[1:]:
            return region
        for node in reversed(list(graph.nodes)):
            users = set(node.users) - ({output} if node is logits else set())
            if (node is logits or users) and users <= region and self.one_by_one(node):
                region.add(node)
        return region

    def has(self, node: fx.Node) -> bool:
        """Whether dim 1 of `node` is as long as the token ids."""
        dims = [at[node][1] if len(at.get(node, ())) >= 2 else None for at in self.shapes]
        return dims == list(self.lengths)

    def one_by_one(self, node: fx.Node) -> bool:
        """Whether a token of `node` depends on that token of its inputs, and on what is the same for all tokens."""
        inputs = node.all_input_nodes
        if not self.has(node) or not inputs or any(arg not in self.shapes[0] for arg in inputs):
            return False  # a size of the whole is among its inputs
        if node.op == "call_module":
            return len(inputs) == 1 and type(self.module.get_submodule(str(node.target))).__name__ in LINEARS
        if is_op(node, *OF_FIRST):
            return self.has(inputs[0]) and all(self.rank(arg) <= 2 and not self.has(arg) for arg in inputs[1:])
        if is_op(node, *NORMS):
            return self.has(inputs[0]) and self.rank(node) - len(node.args[1]) >= 2  # type: ignore[arg-type]
        if is_op(node, *OVER_DIMS):
            return self.has(inputs[0]) and self._over_later_dims(node)
        pointwise = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags
        return pointwise and all(self._aligned(arg, self.rank(node)) for arg in inputs)

    def rank(self, node: fx.Node) -> int:
        return len(self.shapes[0][node])

    def _over_later_dims(self, node: fx.Node) -> bool:
        dims: Any = node.args[1] if len(node.args) > 1 else None
        dims = [dims] if isinstance(dims, int) else dims
        return bool(dims) and all(dim % self.rank(node.all_input_nodes[0]) >= 2 for dim in dims)

    def _aligned(self, arg: fx.Node, rank: int) -> bool:
        """An operand of a pointwise [B, T, ...]: its dim 1 is the tokens, or it is the same for all of them."""
        if self.rank(arg) == rank:
            return self.has(arg) or self.shapes[0][arg][1] == 1
        return self.rank(arg) <= rank - 2
