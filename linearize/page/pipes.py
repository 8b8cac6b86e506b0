"""A program's graph for other tools: Graphviz DOT with a cluster a layer, and SVG."""

from __future__ import annotations

import json
from html import escape

from linearize.page.groups import groups_of, kind_of, label_of
from linearize.page.layout import Shape, draw
from linearize.program import Program, node_line

FILL = {"attention": "#fde68a", "linear": "#bfdbfe", "other": "#e5e7eb", "moves": "#f8fafc", "input": "#ffffff"}
TITLE = 30


def dot(program: Program) -> str:
    """`dot -Tpdf` draws it."""
    lines = [f"digraph {json.dumps(program.model_name)} {{", '  node [shape=box, style=filled, fontname="sans-serif"];']
    groups = groups_of(program)
    for index, group in enumerate(groups):
        lines += [f"  subgraph cluster_{index} {{", f"    label={json.dumps(group.name)};"]
        lines += [
            f"    {json.dumps(node.name)} [label={json.dumps(label_of(node))}, "
            f"fillcolor={json.dumps(FILL[kind_of(node)])}, tooltip={json.dumps(node_line(node))}];"
            for node in group.nodes
        ]
        lines.append("  }")
    drawn = {node for group in groups for node in group.nodes}
    lines += [
        f"  {json.dumps(source.name)} -> {json.dumps(node.name)};"
        for group in groups for node in group.nodes for source in node.all_input_nodes if source in drawn
    ]  # fmt: skip
    return "\n".join([*lines, "}"])


def svg(program: Program) -> str:
    """All groups, one below the other."""
    shapes: list[Shape] = []
    groups = draw(groups_of(program), shapes, {})
    width = max((shapes[one.shape].width for one in groups), default=100)
    parts, y = [], 10
    for one in groups:
        shape = shapes[one.shape]
        parts.append(f'<text x="10" y="{y + 16}" font-weight="600">{escape(one.group.name)}</text>')
        lines = [node_line(node) for node in one.members]
        x = (width - shape.width) // 2
        parts.append(f'<g transform="translate({x},{y + TITLE})">{shape_svg(shape, lines)}</g>')
        y += shape.height + TITLE + 10
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{y}" viewBox="0 0 {width} {y}" '
    return "\n".join([f'{head}font-family="system-ui, sans-serif" font-size="12">', *parts, "</svg>"])


def shape_svg(shape: Shape, lines: list[str]) -> str:
    parts = []
    for source, node in shape.edges:
        (_, _, x1, y1), (_, _, x2, y2) = shape.nodes[source], shape.nodes[node]
        middle = (y1 + y2) / 2
        curve = f"M{x1} {y1 + 11}C{x1} {middle} {x2} {middle} {x2} {y2 - 11}"
        parts.append(f'<path d="{curve}" fill="none" stroke="#94a3b8"/>')
    for (label, kind, x, y), line in zip(shape.nodes, lines, strict=True):
        parts.append(
            f'<g><title>{escape(line)}</title><rect x="{x - 50}" y="{y - 11}" width="100" height="22" rx="5" '
            f'fill="{FILL[kind]}" stroke="#94a3b8"/><text x="{x}" y="{y + 4}" text-anchor="middle">'
            f"{escape(shortened(label))}</text></g>"
        )
    return "".join(parts)


def shortened(label: str, size: int = 15) -> str:
    return label if len(label) <= size else label[: size - 1] + "…"
