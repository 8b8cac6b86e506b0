"""Linear layers and embeddings become modules again, under their original names and over the same parameters.

For fine-tuning: adapters replace modules by name (PEFT's `target_modules`), and a state dict has the source's keys,
those of tied weights included. What is raised: aten.linear and aten.embedding on a parameter `P.weight` -> module P;
aten.matmul by its transpose; aten.addmm, whose weight is stored (in, out), where a class for those is given.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from linearize.pipeline import Keeps, Stage
from linearize.program import Program, node_scope
from linearize.rewriting.editor import Editor
from linearize.rewriting.walk import is_op

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseLinears:
    """`transposed(out_features, in_features)` makes the module of a weight stored as (in, out); None: none is made."""

    transposed: Callable[[int, int], nn.Module] | None = None

    name: ClassVar[str] = "raise_linears"
    stage: ClassVar[Stage] = Stage.LOWER
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        module = own_containers(program.copy_graph())
        editor = Editor(module, self.name)
        for node in list(module.graph.nodes):
            if is_op(node, aten.linear):
                self._raise(editor, node, node.args[0], node.args[1], *node.args[2:3])
            elif is_op(node, aten.embedding):
                _raise_embedding(editor, node)
            elif is_op(node, aten.matmul, aten.mm) and is_transpose(node.args[1]):
                self._raise(editor, node, node.args[0], node.args[1].args[0])  # type: ignore[union-attr]
            elif is_op(node, aten.addmm) and self.transposed is not None:
                self._raise(editor, node, node.args[1], node.args[2], node.args[0], stored=self.transposed)
        return program.replace(module=editor.finish())

    def _raise(self, editor: Editor, node: fx.Node, x: object, weight: object, bias: object = None,
               stored: Callable[[int, int], nn.Module] | None = None) -> None:  # fmt: skip
        owner = owner_of(weight)
        if owner is None or (bias is not None and owner_of(bias, "bias") != owner) or node.kwargs:
            return
        if bias is None and (stored is not None or has_parameter(editor.module, f"{owner}.bias")):
            return  # its bias is added by another node, which reads it by name
        tensor = editor.module.get_parameter(f"{owner}.weight")
        first, second = tensor.shape
        made = stored(second, first) if stored else nn.Linear(second, first, bias=bias is not None, device="meta")
        made.weight = tensor
        if bias is not None:
            made.bias = editor.module.get_parameter(f"{owner}.bias")
        put(editor, node, owner, made, x)


def own_containers(module: fx.GraphModule) -> fx.GraphModule:
    """Give the graph modules of its own to hold the parameters, so that the program it came from keeps its."""

    def copied(old: nn.Module) -> nn.Module:
        if type(old) is not nn.Module:
            return old
        new = nn.Module()
        new._parameters, new._buffers = dict(old._parameters), dict(old._buffers)
        new._non_persistent_buffers_set = set(old._non_persistent_buffers_set)
        for name, child in old._modules.items():
            new._modules[name] = copied(child) if child is not None else None
        return new.train(old.training)

    for name, child in list(module._modules.items()):
        if child is not None:
            module._modules[name] = copied(child)
    return module


def _raise_embedding(editor: Editor, node: fx.Node) -> None:
    table, ids, *rest = node.args
    if not is_parameter(table) or len(rest) > 1 or node.kwargs:
        return
    name = str(table.target)  # type: ignore[union-attr]
    owner = name.removesuffix(".weight")
    if owner == name or isinstance(module_at(editor.module, owner), nn.Linear) or shared_with_linear(table):
        owner = node_scope(node)  # a tied weight goes by the name of the output layer
    if not owner or owner.startswith("linearize_"):
        return
    weight = editor.module.get_parameter(name)
    padding = rest[0] if rest and isinstance(rest[0], int) and rest[0] >= 0 else None
    made = nn.Embedding(weight.shape[0], weight.shape[1], padding_idx=padding, device="meta")
    made.weight = weight
    put(editor, node, owner, made, ids)


def put(editor: Editor, node: fx.Node, owner: str, made: nn.Module, x: object) -> None:
    """`made` stands at `owner`, keeping what else is there, and `node` becomes its call."""
    before = module_at(editor.module, owner)
    if before is not None and type(before) is not nn.Module and type(before) is not type(made):
        return
    if type(before) is nn.Module or before is None:
        for name, buffer in before.named_buffers(recurse=False) if before is not None else ():
            made.register_buffer(name, buffer)
        editor.module.add_submodule(owner, made.train(editor.module.training))
    with editor.at(node):
        call = editor.call_module(owner, x, origin=node)
        if "val" in node.meta:
            call.meta["val"] = node.meta["val"]
    editor.replace(node, call)


def owner_of(node: object, leaf: str = "weight") -> str | None:
    """`P` of a read of the parameter `P.weight`."""
    if not is_parameter(node):
        return None
    owner, _, last = str(node.target).rpartition(".")  # type: ignore[attr-defined]
    return owner if owner and last == leaf else None


def is_parameter(node: object) -> bool:
    return isinstance(node, fx.Node) and node.op == "get_attr"


def is_transpose(node: object) -> bool:
    """Whether `node` is the transpose of a matrix parameter."""
    if not isinstance(node, fx.Node) or not node.args or not is_parameter(node.args[0]):
        return False
    if is_op(node, aten.t) or (is_op(node, aten.permute) and list(node.args[1]) == [1, 0]):  # type: ignore[arg-type]
        return True
    return is_op(node, aten.transpose) and set(node.args[1:3]) in ({0, 1}, {-1, -2})


def shared_with_linear(table: object) -> bool:
    target = str(table.target)  # type: ignore[attr-defined]
    readers = (node for node in table.graph.nodes if node.op == "get_attr" and node.target == target)  # type: ignore[attr-defined]
    return any(is_op(user, aten.linear) for node in readers for user in node.users)


def module_at(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def has_parameter(root: nn.Module, path: str) -> bool:
    try:
        root.get_parameter(path)
    except AttributeError:
        return False
    return True
