"""Products with a weight become two with thin ones: y = W x + b -> y = A (B x) + b."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor, fx, nn

from linearize.errors import RecipeError
from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import Editor
from linearize.rewriting.walk import attribute, is_op

aten = torch.ops.aten
LOW_RANK = "linearize_low_rank"


class Product(NamedTuple):
    """A node that multiplies by the matrix `parameter`, W [out,in], or [in,out] where it is `transposed`."""

    node: fx.Node
    x: fx.Node
    parameter: str
    bias: fx.Node | None
    transposed: bool


def products(module: fx.GraphModule) -> list[Product]:
    """Every product of activations with a parameter that nothing but such products reads, in order."""
    found = every_product(module.graph)
    readers: Counter[int] = Counter()
    for node in module.graph.nodes:
        if node.op == "get_attr":
            readers[id(attribute(module, str(node.target)))] += len(node.users)
    own = {product.parameter: id(attribute(module, product.parameter)) for product in found}
    counted = Counter(own[product.parameter] for product in found)
    return [product for product in found if readers[own[product.parameter]] == counted[own[product.parameter]]]


def every_product(graph: fx.Graph) -> list[Product]:
    """The same, whatever else reads the parameter (an embedding that the output projection is tied to)."""
    return [product for node in graph.nodes if (product := _product(node)) is not None]


def _product(node: fx.Node) -> Product | None:
    if is_op(node, aten.linear):
        return _made(node, node.args[0], node.args[1], node.args[2] if len(node.args) > 2 else None, False)
    if is_op(node, aten.addmm) and not node.kwargs:
        return _made(node, node.args[1], node.args[2], node.args[0], True)
    if is_op(node, aten.matmul, aten.mm):
        return _made(node, node.args[0], node.args[1], None, True)
    return None


def _made(node: fx.Node, x: object, weight: object, bias: object, transposed: bool) -> Product | None:
    if is_op(weight, aten.t, aten.transpose, aten.permute) and len(weight.users) == 1:  # type: ignore[attr-defined]
        weight, transposed = weight.args[0], not transposed  # type: ignore[attr-defined]
    if not isinstance(x, fx.Node) or not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    value = weight.meta.get("val")
    if isinstance(value, Tensor) and value.ndim != 2:
        return None
    return Product(node, x, str(weight.target), bias if isinstance(bias, fx.Node) else None, transposed)


@dataclass(frozen=True)
class LowerRank:
    """Lossy. `factors` gives, by the name of a weight, A [out,r] and B [r,in].

    Raises:
        RecipeError: a weight is not in the graph, or something else reads it too.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]

    name: ClassVar[str] = "lower_rank"
    stage: ClassVar[Stage] = Stage.CALIBRATE
    keeps: ClassVar[Keeps] = Keeps.LOSSY

    def run(self, program: Program) -> Program:
        module = program.copy_graph()
        editor, held = Editor(module, self.name), nn.Module()
        module.add_submodule(LOW_RANK, held)
        found = products(module)
        missing = sorted(set(self.factors) - {product.parameter for product in found})
        if missing:
            where = f"in {program.model_name}, or is read elsewhere too"
            raise RecipeError(f"{missing[0]} is no weight of a product {where}")
        for name, (second, first) in self.factors.items():
            dtype = attribute(module, name).dtype
            for part, tensor in (("first", first), ("second", second)):
                _hold(held, f"{name.removesuffix('.weight')}.{part}", tensor.to(dtype))
        for product in found:
            if product.parameter in self.factors:
                _split(editor, product)
        finished = program.replace(module=editor.finish())
        return finished.replace(module=finished.copy_graph())  # without the weights that are read no longer


def _hold(root: nn.Module, path: str, tensor: Tensor) -> None:
    """`tensor` as the parameter `path`.weight below `root`."""
    for part in path.split("."):
        if part not in root._modules:
            root.add_module(part, nn.Module())
        root = root.get_submodule(part)
    root.register_parameter("weight", nn.Parameter(tensor.contiguous()))


def _split(editor: Editor, product: Product) -> None:
    path = f"{LOW_RANK}.{product.parameter.removesuffix('.weight')}"
    with editor.at(product.node):
        first = editor.graph.get_attr(f"{path}.first.weight")
        second = editor.graph.get_attr(f"{path}.second.weight")
        thin = editor.call(aten.linear.default, product.x, first)
        rest = () if product.bias is None else (product.bias,)
        wide = editor.call(aten.linear.default, thin, second, *rest, origin=product.node)
    editor.replace(product.node, wide)
