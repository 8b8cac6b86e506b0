"""Einsums over two activations become `matmul` of rank 4, attention's spelling; those of three operands become pairs.

    einsum("bthd,bshd->bhts", q, k) -> matmul(permute(q) [b,h,t,d], permute(k) [b,h,d,s])
    einsum("bhqd,bkd->bhqk", q, k)  -> matmul(q, unsqueeze(transpose(k), 1))                       one head of keys

The letters say everything: batch letters are in all three terms, one letter is summed, one stays of each side. A
second free letter on one side is a dim of heads that the other side shares. What does not fit stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from string import ascii_letters
from typing import Any, ClassVar

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher

from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import Editor
from linearize.rewriting.walk import is_op, shape_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Pair:
    """`left`, `right` -> `out`, a letter a dim; the product is `lead` + `rows` + `columns`, summed over `inner`."""

    left: str
    right: str
    out: str
    lead: str
    rows: str
    columns: str
    inner: str


@dataclass(frozen=True)
class SpellEinsums:
    name: ClassVar[str] = "spell_einsums"
    stage: ClassVar[Stage] = Stage.NORMALISE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        found = [node for node in program.graph.nodes if is_op(node, aten.einsum) and len(node.args[1]) > 1]
        if not found:
            return program
        module = program.copy_graph()
        editor = Editor(module, self.name)
        for node in list(module.graph.nodes):
            if is_op(node, aten.einsum) and len(node.args[1]) > 1:
                with editor.at(node):
                    new = _spelled(editor, node)
                if new is not None:
                    editor.replace(node, new)
        return program.replace(module=editor.finish())


def _spelled(editor: Editor, node: fx.Node) -> fx.Node | None:
    terms = read_equation(str(node.args[0]), [len(shape_of(arg)) for arg in node.args[1]])  # type: ignore[arg-type,union-attr]
    if terms is None:
        return None
    *letters, out = terms
    operands: list[Any] = list(node.args[1])  # type: ignore[arg-type]
    while len(operands) > 2:
        first, second, *rest = letters
        kept = "".join(dict.fromkeys(c for c in first + second if c in out or any(c in term for term in rest)))
        joined = _product(editor, node, operands[:2], first, second, kept)
        operands, letters = [joined, *operands[2:]], [kept, *rest]
    left, right = letters
    return _product(editor, node, operands, left, right, out, keep_if_odd=len(node.args[1]) == 2)  # type: ignore[arg-type]


def read_equation(equation: str, ranks: list[int]) -> list[str] | None:
    """Letters of every operand and of the result, `...` spelled out and the result of an implicit equation added;
    None where a letter stands twice in one term."""
    equation = equation.replace(" ", "")
    operands, _, out = equation.partition("->")
    terms = operands.split(",")
    if "->" not in equation:
        joined = "".join(terms)
        out = ("..." if "..." in equation else "") + "".join(
            sorted(c for c in set(joined) - {"."} if joined.count(c) == 1)
        )
    spare = [letter for letter in ascii_letters if letter not in equation]
    widths = [rank - len(term.replace("...", "")) for term, rank in zip(terms, ranks, strict=True) if "..." in term]
    dots = "".join(spare[: max(widths, default=0)])
    spelled = [
        term.replace("...", dots[len(dots) - (rank - len(term) + 3) :] if "..." in term else "")
        for term, rank in zip(terms, ranks, strict=True)
    ]
    spelled.append(out.replace("...", dots))
    return spelled if all(len(set(term)) == len(term) for term in spelled) else None


def read_pair(left: str, right: str, out: str, is_number: Callable[[str], bool]) -> Pair | None:
    """The roles of the letters, or None where this is no product of attention's kind. `is_number` of a letter: its
    dim is a constant, as heads are and sequences are not."""
    inner = "".join(c for c in left if c in right and c not in out)
    lead = "".join(c for c in left if c in right and c in out)
    sides = ["".join(c for c in a if c not in b) for a, b in ((left, right), (right, left))]
    if len(inner) != 1 or any(c not in out for c in "".join(sides)):
        return None
    shared = ""
    for side in (0, 1):
        if len(sides[side]) == 2:
            heads = [c for c in sides[side] if is_number(c)] or [sides[side][0]]
            shared += heads[0]
            sides[side] = sides[side].replace(heads[0], "")
    lead = "".join(sorted(lead + shared, key=lambda c: (is_number(c), out.index(c))))
    if len(sides[0]) != 1 or len(sides[1]) != 1 or not 1 <= len(lead) <= 3:
        return None
    return Pair(left, right, out, lead, sides[0], sides[1], inner)


def _product(
    editor: Editor, node: fx.Node, operands: list[Any], left: str, right: str, out: str, keep_if_odd: bool = False
) -> fx.Node | None:
    sizes = {c: dim for term, operand in ((left, operands[0]), (right, operands[1])) for c, dim in _dims(term, operand)}
    pair = read_pair(left, right, out, lambda c: isinstance(sizes[c], int))
    weights = any(len(shape_of(operand)) < 3 or not _has_batch(operand) for operand in operands)
    if pair is None or (weights and keep_if_odd):
        return None if keep_if_odd else call(editor, node, aten.einsum.default, f"{left},{right}->{out}", operands)
    a = _arranged(editor, node, operands[0], left, pair.lead + pair.rows + pair.inner)
    if right.index(pair.columns) < right.index(pair.inner):  # a key, which the product wants transposed
        key = _arranged(editor, node, operands[1], right, pair.lead + pair.columns + pair.inner)
        b = call(editor, node, aten.transpose.int, key, -2, -1)
    else:
        b = _arranged(editor, node, operands[1], right, pair.lead + pair.inner + pair.columns)
    product = call(editor, node, aten.matmul.default, a, b)
    return _arranged(editor, node, product, pair.lead + pair.rows + pair.columns, out)


def _has_batch(operand: fx.Node) -> bool:
    """Whether a dim of the operand is made of the batch: no weight's is, nor a matrix of positions'."""
    tokens = next(node for node in operand.graph.nodes if node.op == "placeholder")
    batch = shape_of(tokens)[0]
    if isinstance(batch, int):
        return True
    sizes = [size for size in shape_of(operand) if not isinstance(size, int)]
    return any(batch.node.expr in size.node.expr.free_symbols for size in sizes)


def _dims(term: str, operand: fx.Node) -> list[tuple[str, Any]]:
    return list(zip(term, shape_of(operand), strict=True))


def _arranged(editor: Editor, node: fx.Node, operand: fx.Node, have: str, want: str) -> fx.Node:
    """`operand` with its dims in the order of `want`, dims that it lacks of size 1."""
    order = [have.index(c) for c in want if c in have]
    if order != list(range(len(have))):
        swapped = [i for i, place in enumerate(order) if i != place]
        if len(swapped) == 2:
            operand = call(editor, node, aten.transpose.int, operand, *swapped)
        else:
            operand = call(editor, node, aten.permute.default, operand, order)
    for place, c in enumerate(want):
        if c not in have:
            operand = call(editor, node, aten.unsqueeze.default, operand, place)
    return operand


def call(editor: Editor, origin: fx.Node, target: Callable[..., Any], *args: Any) -> fx.Node:
    """A new node with its own shape: matching reads shapes.

    Operators that are made of others (matmul) ask for sizes as numbers, which fixes the batch and the length to those
    traced on torch 2.11; the Python dispatcher takes them apart with symbols.
    """
    new = editor.call(target, *args, origin=origin)
    with enable_python_dispatcher():
        new.meta["val"] = target(*fx.node.map_arg(args, lambda arg: arg.meta["val"]))
    return new
