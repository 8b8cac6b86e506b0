"""Where a group's nodes stand: networkx's topological generations downwards, ordered to keep edges short.

Layers of a model mostly have the same shape, so a shape is laid out once and shared.
"""

from __future__ import annotations

from dataclasses import dataclass

import networkx as nx
from torch import fx

from linearize.page.groups import Group, kind_of, label_of

STEP_X, STEP_Y, MARGIN = 112, 44, 62
SWEEPS = 4


@dataclass(frozen=True)
class Shape:
    """`nodes` are (label, kind, x, y), `edges` pairs of their numbers; what comes from outside has kind "input"."""

    nodes: tuple[tuple[str, str, int, int], ...]
    edges: tuple[tuple[int, int], ...]
    width: int
    height: int


@dataclass(frozen=True)
class Drawn:
    """A group's shape, and the nodes that stand at its places (an outside node for an input)."""

    group: Group
    shape: int
    members: tuple[fx.Node, ...]


def draw(groups: list[Group], shapes: list[Shape], known: dict[object, int]) -> list[Drawn]:
    """Lay out every group; new shapes are appended to `shapes`."""
    return [_draw(group, shapes, known) for group in groups]


def _draw(group: Group, shapes: list[Shape], known: dict[object, int]) -> Drawn:
    inside = set(group.nodes)
    outside = dict.fromkeys(
        source for node in group.nodes for source in node.all_input_nodes
        if source not in inside and source.op not in ("get_attr", "placeholder")
    )  # fmt: skip
    members = (*outside, *group.nodes)
    number = {node: index for index, node in enumerate(members)}
    edges = tuple(
        (number[source], number[node]) for node in group.nodes for source in node.all_input_nodes if source in number
    )
    labels = tuple((("input", "input") if node in outside else (label_of(node), kind_of(node))) for node in members)
    key = (labels, edges)
    if key not in known:
        known[key] = len(shapes)
        shapes.append(_lay_out(labels, edges))
    return Drawn(group, known[key], members)


def _lay_out(labels: tuple[tuple[str, str], ...], edges: tuple[tuple[int, int], ...]) -> Shape:
    graph = nx.DiGraph()
    graph.add_nodes_from(range(len(labels)))
    graph.add_edges_from(edges)
    rows = [sorted(row) for row in nx.topological_generations(graph)]
    rows = _inputs_lowered(rows, graph, {index for index, (_, kind) in enumerate(labels) if kind == "input"})
    for sweep in range(SWEEPS):
        _order(rows, graph, downwards=sweep % 2 == 0)
    widest = max(len(row) for row in rows)
    placed = {}
    for y, row in enumerate(rows):
        for x, node in enumerate(row):
            placed[node] = (round((x + (widest - len(row)) / 2) * STEP_X) + MARGIN, y * STEP_Y + MARGIN // 2)
    nodes = tuple((label, kind, *placed[index]) for index, (label, kind) in enumerate(labels))
    return Shape(nodes, edges, (widest - 1) * STEP_X + 2 * MARGIN, (len(rows) - 1) * STEP_Y + MARGIN)


def _inputs_lowered(rows: list[list[int]], graph: nx.DiGraph, inputs: set[int]) -> list[list[int]]:
    """Inputs stand right above the first node that reads them, and not all in the first row."""
    depth = {node: at for at, row in enumerate(rows) for node in row}
    for node in inputs:
        depth[node] = max(min((depth[user] for user in graph.successors(node)), default=1) - 1, 0)
    lowest = max(depth.values(), default=0)
    return [row for at in range(lowest + 1) if (row := [node for node in depth if depth[node] == at])]


def _order(rows: list[list[int]], graph: nx.DiGraph, downwards: bool) -> None:
    """Sort every row by the mean place of its neighbours in the row before (barycentre)."""
    place = {node: x - len(row) / 2 for row in rows for x, node in enumerate(row)}
    for row in rows if downwards else reversed(rows):
        def middle(node: int) -> float:
            near = list(graph.predecessors(node) if downwards else graph.successors(node))
            return sum(place[other] for other in near) / len(near) if near else place[node]

        row.sort(key=middle)
        place.update({node: x - len(row) / 2 for x, node in enumerate(row)})
