"""A graph that returns the values of chosen nodes instead of its own output, for training through it."""

from __future__ import annotations

from torch import fx

from linearize.rewriting.editor import remove_dead


def tapped(module: fx.GraphModule, nodes: list[str]) -> fx.GraphModule:
    """A new GraphModule over the same parameters that returns the nodes of these names, as a tuple."""
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    graph.graph_copy(module.graph, mapping)
    found = {old.name: new for old, new in mapping.items()}
    graph.output(tuple(found[name] for name in nodes))
    remove_dead(graph)
    return fx.GraphModule(module, graph)
