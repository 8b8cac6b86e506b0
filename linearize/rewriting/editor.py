"""The only code that edits a graph. New nodes carry the rule that made them and the node that they stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx, nn

from linearize.program import StateTensor

KEPT = "linearize_kept_for"


def remove_dead(graph: fx.Graph) -> None:
    """Remove every node that the output does not need, unless it is kept (`keep`). torch keeps operators that may draw
    random numbers (SDPA, for its dropout); in inference none does."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output") or KEPT in node.meta)


def keep(node: fx.Node, for_node: fx.Node) -> None:
    """`node` stays though nothing uses it yet: it is what mixers may want of `for_node` (its value before rotation)."""
    node.meta[KEPT] = for_node.name


def kept_for(graph: fx.Graph) -> dict[str, fx.Node]:
    """The kept nodes, by the name of the node that each was kept for."""
    return {node.meta[KEPT]: node for node in graph.nodes if KEPT in node.meta}


def release(graph: fx.Graph) -> None:
    """Nothing is kept any longer."""
    for node in graph.nodes:
        node.meta.pop(KEPT, None)


def retarget(module: fx.GraphModule, device: torch.device) -> None:
    """Constants that the graph makes (aranges, zeros) are made on `device`, where its parameters have moved."""
    changed = False
    for node in module.graph.nodes:
        if node.kwargs.get("device", device) not in (None, device):
            node.update_kwarg("device", device)
            changed = True
    if changed:
        module.recompile()


class Editor:
    """Edits one graph on behalf of one rule (a pass); `finish` cleans up and recompiles."""

    def __init__(self, module: fx.GraphModule, rule: str) -> None:
        self.module, self.graph, self.rule = module, module.graph, rule

    @contextmanager
    def at(self, node: fx.Node) -> Iterator[None]:
        """Insert what follows before `node`."""
        with self.graph.inserting_before(node):
            yield

    def call(self, target: Callable[..., Any], *args: Any, origin: fx.Node | None = None, **kwargs: Any) -> fx.Node:
        return self._stamped(self.graph.call_function(target, args, kwargs), origin)

    def call_module(self, target: str, *args: Any, origin: fx.Node | None = None) -> fx.Node:
        return self._stamped(self.graph.call_module(target, args), origin)

    def copy(self, node: fx.Node, instead: Mapping[fx.Node, fx.Node]) -> fx.Node:
        """`node` again, reading other nodes where `instead` has them."""
        copy = self.graph.node_copy(node, lambda arg: instead.get(arg, arg))
        copy.meta = {key: value for key, value in node.meta.items() if key != "val"}
        copy.meta |= {"rule": self.rule, "origin": node.name}
        return copy

    def add_input(self, name: str, after: fx.Node | None, state: StateTensor | None = None) -> fx.Node:
        """A new placeholder behind `after` (first of all when None)."""
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_after(after) if after is not None else self.graph.inserting_before(first):
            node = self.graph.placeholder(name)
        if state is not None:
            node.meta["state"] = state
        return self._stamped(node, None)

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """All users of `old` take `new`; `old` goes once it is dead."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)

    def finish(self) -> fx.GraphModule:
        remove_dead(self.graph)
        self.graph.lint()
        self.module.recompile()
        return self.module

    def _stamped(self, node: fx.Node, origin: fx.Node | None) -> fx.Node:
        node.meta["rule"] = self.rule
        if origin is not None:
            node.meta["origin"] = origin.name
            for key in ("linearize_scope", "nn_module_stack", "stack_trace"):
                if key in origin.meta:
                    node.meta[key] = origin.meta[key]
            if "val" in origin.meta and node.op == "call_function":
                node.meta.setdefault("val", origin.meta["val"])
        return node


class InliningTracer(fx.Tracer):
    """Appends what a submodule computes to an existing graph, as operators on the graph's own nodes."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__()
        self.root, self.graph = root, graph
        self.tensor_attrs = {}

    def inline(self, target: str, args: list[fx.Node]) -> list[fx.Node]:
        """Nodes of the tuple that the submodule at `target` returns; call inside `graph.inserting_before(...)`."""
        submodule = self.root.get_submodule(target)
        proxies = [fx.Proxy(node, self) for node in args]
        with self._tensors_as_proxies(submodule, target):
            return [proxy.node for proxy in submodule.forward(*proxies)]

    @contextmanager
    def _tensors_as_proxies(self, submodule: nn.Module, target: str) -> Iterator[None]:
        """Parameters and buffers read as nodes, so that what is computed from them alone is in the graph too."""
        hidden = []
        for path, module in submodule.named_modules(prefix=target):
            tensors = {**module._parameters, **module._buffers}
            for name in (name for name, tensor in tensors.items() if tensor is not None):
                node = self.create_node("get_attr", f"{path}.{name}", (), {})
                module.__dict__[name] = fx.Proxy(node, self)  # found before Module.__getattr__ is asked
                hidden.append((module, name))
        try:
            yield
        finally:
            for module, name in hidden:
                del module.__dict__[name]
