"""The page: tables and plots are HTML at once, graphs and stages are data that the script opens when asked."""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from importlib.resources import files
from typing import Any

from linearize.page.costs import CONTEXTS, cache_bytes, predicted_speedup, state_bytes, weight_bytes
from linearize.page.groups import groups_of
from linearize.page.layout import Drawn, Shape, draw
from linearize.plan import Plan
from linearize.printing import bytes_text, shape_text
from linearize.program import Program, Record, node_line
from linearize.report import Report
from linearize.spec import NoMatch, Site
from linearize.svg import Line, bar_plot, line_plot


@dataclass(frozen=True)
class Subject:
    """What the page is about. `before` and `after` are programs; None where there is none (no recipe; a directory that
    was compiled earlier does not hold its source). `stages` are the records of the passes, in order."""

    name: str
    before: Program | None
    after: Program | None
    plan: Plan | None = None
    report: Report | None = None
    stages: Sequence[Record] = ()
    notes: Sequence[str] = field(default=())

    @property
    def program(self) -> Program:
        found = self.before or self.after
        assert found is not None
        return found


def page(subject: Subject) -> str:
    """One HTML document that needs nothing else."""
    shapes: list[Shape] = []
    known: dict[object, int] = {}
    graphs = {
        title: draw(groups_of(program), shapes, known)
        for title, program in (("before", subject.before), ("after", subject.after)) if program is not None
    }  # fmt: skip
    sections = [
        _section("sites", "Attentions", sites_table(subject)),
        _section("costs", "What it costs", _plots(subject)),
        _section("why", "What was refused, and why", refusals(subject)),
        _section("graph", "Graph", _graphs(graphs)),
        _section("stages", "Stages", _stages(subject.stages)),
    ]
    data = [
        _data("shapes", [[shape.nodes, shape.edges, shape.width, shape.height] for shape in shapes]),
        _data("graphs", {title: [_lines(one) for one in drawn] for title, drawn in graphs.items()}),
        _data("texts", _shared_lines([record.text for record in subject.stages])),
    ]
    body = "\n".join([_head(subject), *(section for section in sections if section), *data])
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(subject.name)} · linearize</title>'
        f"<style>{_asset('page.css')}</style></head>\n<body>\n{body}\n"
        f"<script>{_asset('page.js')}</script>\n</body></html>\n"
    )


def _asset(name: str) -> str:
    return (files("linearize.page") / name).read_text(encoding="utf-8")


def _data(name: str, value: Any) -> str:
    packed = gzip.compress(json.dumps(value, separators=(",", ":")).encode(), 9, mtime=0)
    return f'<script type="application/octet-stream" id="data-{name}">{base64.b64encode(packed).decode()}</script>'


def _lines(drawn: Drawn) -> dict[str, Any]:
    return {"shape": drawn.shape, "lines": [node_line(node) for node in drawn.members]}


def _shared_lines(texts: Sequence[str]) -> dict[str, Any]:
    """Every different line once, and the texts as numbers of lines: most passes change few lines."""
    numbers: dict[str, int] = {}
    stripped = [[line.strip() for line in text.splitlines() if line.strip()] for text in texts]
    rows = [[numbers.setdefault(line, len(numbers)) for line in text] for text in stripped]
    return {"lines": list(numbers), "texts": rows}


# ---- what is HTML at once --------------------------------------------------------------------------------------------


def _section(name: str, title: str, content: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>\n{content}</section>' if content else ""


def _head(subject: Subject) -> str:
    program = subject.program
    matched, total = len(program.matched), len(program.sites)
    facts = [("attentions matched", f"{matched} of {total}"), ("weights", bytes_text(weight_bytes(program)))]
    if subject.after is not None:
        context = 16384
        facts += [
            ("state at 16k", bytes_text(state_bytes(subject.after, context))),
            ("cache at 16k", bytes_text(cache_bytes(subject.after, context))),
        ]
    if subject.report is not None and subject.report.mean_error() is not None:
        facts.append(("mean MSE", f"{subject.report.mean_error():.4f}"))
    cards = "".join(f"<div><dd>{escape(value)}</dd><dt>{escape(name)}</dt></div>" for name, value in facts)
    recipe = f" · recipe <code>{escape(subject.plan.recipe)}</code>" if subject.plan is not None else ""
    links = "".join(f'<a href="#{name}">{name}</a>' for name in ("sites", "costs", "why", "graph", "stages"))
    return (
        f'<header><h1>{escape(subject.name)}</h1><p>captured by {escape(program.captured_by)}{recipe}</p>'
        f"<dl>{cards}</dl><nav>{links}</nav></header>"
    )


def sites_table(subject: Subject) -> str:
    """Every attention: what it is, what it becomes and why, and its error where that was measured."""
    reports = {row.site: row for row in subject.report.sites} if subject.report else {}
    entries = {entry.site: entry for entry in subject.plan.entries} if subject.plan else {}
    measured = any(row.error_fitted is not None for row in reports.values())
    headers = ["site", "module", "heads", "mask", "extras", "becomes", *(["MSE start", "MSE"] if measured else [])]
    rows = []
    for site in subject.program.sites:
        entry, row = entries.get(site.index), reports.get(site.index)
        becomes = '<td class="bad">left as it is</td>' if not site.matched else "<td>-</td>"
        if entry is not None:
            becomes = f'<td title="{escape(entry.reason)}"><code>{escape(entry.label())}</code></td>'
        cells = _site_cells(site) + becomes
        if measured:
            cells += "".join(f'<td class="n">{_error(value)}</td>' for value in (
                (row.error_start, row.error_fitted) if row else (None, None)))  # fmt: skip
        rows.append(f"<tr>{cells}</tr>")
    if not rows:
        return "<p>No softmax attention was found in this model.</p>"
    numbers = ("site", "MSE start", "MSE")
    head = "".join(f"<th{' class=n' if name in numbers else ''}>{name}</th>" for name in headers)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'


def _site_cells(site: Site | NoMatch) -> str:
    first = f'<td class="n">{site.index}</td><td><code>{escape(site.module)}</code></td>'
    if isinstance(site, NoMatch):
        return f'{first}<td colspan="3" class="bad why">refused: {escape(site.reason)}</td>'
    return (
        f"{first}<td>{escape(shape_text(site))}</td><td>{escape(str(site.attention.mask))}</td>"
        f"<td>{escape(' '.join(site.extras))}</td>"
    )


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def refusals(subject: Subject) -> str:
    """The reason of every refused attention with the nodes that were looked at, and the notes of the compiler."""
    parts = []
    for site in subject.program.refused:
        chain = "".join(
            f'<span class="{"bad" if at == site.stopped_at else ""}">{escape(line)}</span>\n'
            for at, line in enumerate(site.chain)
        )
        where = f" <small>{escape(site.source)}</small>" if site.source else ""
        parts.append(
            f"<details><summary>site {site.index} <code>{escape(site.module)}</code>: {escape(site.reason)}</summary>"
            f"<p>the chain that was read{where}</p><pre>{chain}</pre></details>"
        )
    notes = dict.fromkeys([*subject.notes, *(subject.report.notes if subject.report else ())])
    if notes:
        parts.append("<ul>" + "".join(f"<li>{escape(note)}</li>" for note in notes) + "</ul>")
    return "\n".join(parts) or "<p>Nothing was refused.</p>"


def _plots(subject: Subject) -> str:
    """Cache and state by context, the predicted speed, and the error of every layer."""
    program = subject.program
    if not program.matched:
        return ""
    carried = [Line("source's cache", [(context, cache_bytes(program, context)) for context in CONTEXTS])]
    if subject.after is not None:
        carried.append(Line("state", [(context, state_bytes(subject.after, context)) for context in CONTEXTS]))
    drawn = [line_plot(carried, "carried by one sequence", "tokens of context", bytes_text, base=2)]
    if subject.after is not None:
        ratio = [(context, predicted_speedup(program, subject.after, context)) for context in CONTEXTS]
        lines = [Line("source", [(context, 1.0) for context in CONTEXTS]), Line("linearized", ratio)]
        drawn.append(line_plot(lines, "predicted decoding speed, batch 1", "tokens of context", lambda x: f"{x:g}x"))
    errors = [(row.site, row.error_start, row.error_fitted) for row in subject.report.sites] if subject.report else []
    fitted = [(str(site), fit) for site, _, fit in errors if fit is not None]
    if fitted:
        start = {str(site): begin for site, begin, _ in errors if begin is not None}
        drawn.append(bar_plot("relative MSE of each attention's output", fitted, start, "site"))
    said = (
        "<p><small>The prediction is the ratio of the bytes that a step reads (weights, and cache or state), as where "
        "memory is the limit; <code>linearize bench</code> measures.</small></p>"
    )
    return f'<div class="plots">{"".join(drawn)}</div>{said}'


def _graphs(graphs: dict[str, list[Drawn]]) -> str:
    columns = []
    for title, drawn in graphs.items():
        boxes = "".join(
            '<li><button type="button" class="group" aria-expanded="false" '
            f'data-graph="{title}" data-group="{number}">'
            f"<span>{escape(one.group.name)}</span>{_badge(one)}"
            f"<small>{len(one.group.nodes)} operators</small></button></li>"
            for number, one in enumerate(drawn)
        )
        columns.append(
            f'<div class="column"><h3>{title}</h3><p class="tools"><button type="button" data-all="{title}">open all'
            f'</button> <button type="button" data-none="{title}">close all</button></p><ol>{boxes}</ol></div>'
        )
    kinds = ("attention", "linear", "other", "moves", "input")
    legend = "".join(f'<span class="key {kind}">{kind}</span>' for kind in kinds)
    return f'<p class="legend">{legend} <small>+ - 0 zoom an open graph, arrows move it</small></p>' + (
        f'<div class="columns">{"".join(columns)}</div>'
    )


def _badge(drawn: Drawn) -> str:
    return "".join(f'<b class="badge">site {site}</b>' for site in drawn.group.sites[:3])


def _stages(stages: Sequence[Record]) -> str:
    if not stages:
        return ""
    rows = "".join(
        f'<tr><td class="n">{number}</td><td><code>{escape(record.name)}</code></td>'
        f'<td class="n">{sum(record.op_counts.values())}</td><td class="n">{record.seconds:.2f} s</td>'
        f'<td class="why">{escape(record.note)}</td></tr>'
        for number, record in enumerate(stages)
    )
    first, last = _options(stages, 0), _options(stages, len(stages) - 1)
    return (
        '<div class="wide"><table><thead><tr><th class="n">stage</th><th>pass</th><th class="n">operators</th>'
        '<th class="n">time</th><th></th></tr>'
        f'</thead><tbody>{rows}</tbody></table></div><p class="diffbar"><label>from <select id="from">{first}</select>'
        f'</label> <label>to <select id="to">{last}</select></label> '
        '<button type="button" id="compare">compare</button>'
        '</p><div id="diff" aria-live="polite"></div>'
    )


def _options(stages: Iterable[Record], chosen: int) -> str:
    return "".join(
        f'<option value="{number}"{" selected" if number == chosen else ""}>{number} {escape(record.name)}</option>'
        for number, record in enumerate(stages)
    )
