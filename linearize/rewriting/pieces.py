"""A stretch of a graph as a module of its own: from some nodes, whose values are given, to some that are asked for."""

from __future__ import annotations

from collections.abc import Sequence

from torch import fx

from linearize.rewriting.walk import cone


def cut_out(module: fx.GraphModule, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> fx.GraphModule:
    """A new GraphModule over the same parameters and modules: it takes the values of `inputs`, then those of the
    graph's own placeholders that are needed behind them, and returns `outputs` as a tuple."""
    inside = cone(outputs, inputs)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        mapping[node] = graph.placeholder(node.name)
        mapping[node].meta = dict(node.meta)
    rest = [node for node in module.graph.nodes if node in inside and node not in mapping]
    for node in sorted(rest, key=lambda one: one.op != "placeholder"):  # stable: placeholders first
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    graph.output(tuple(mapping[node] for node in outputs))
    return fx.GraphModule(module, graph)
