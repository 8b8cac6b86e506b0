"""What users see: programs, sites, plans and reports as rich renderables. Pure: nothing is printed or read here.

Tables stay readable at 80 columns: long text folds, numbers do not.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from linearize.plan import Plan
from linearize.program import Program, Record
from linearize.recipe import Recipe
from linearize.report import EndToEndReport, Report
from linearize.spec import NoMatch, Site

Row = tuple[str, ...]

EMPTY = Text("")
SCOPE = re.compile(r"^\s*# (?P<scope>\S+)$")


class PlainTable(Table):
    """A table whose cells are text as it is: shapes and errors are full of brackets that rich would read as markup."""

    def add_row(self, *cells: RenderableType | None, **options: Any) -> None:
        super().add_row(*[Text(cell) if isinstance(cell, str) else cell for cell in cells], **options)


def table(*columns: str, title: str = "", right: Sequence[str] = (), whole: Sequence[str] = ()) -> PlainTable:
    """A table without frames. Columns named in `right` hold numbers; those and the ones in `whole` are not folded."""
    made = PlainTable(
        title=Text(title) if title else None, title_justify="left", title_style="bold", min_width=len(title) or None,
        box=None, pad_edge=False, show_header=any(columns), header_style="dim",
    )  # fmt: skip
    for column in columns:
        number = column in right
        made.add_column(
            column, justify="right" if number else "left", no_wrap=number or column in whole, overflow="fold"
        )
    return made


def notes(lines: Iterable[str]) -> RenderableType:
    """Remarks below a table, one line each; nothing where there are none."""
    found = [Text(f"· {line}", style="dim") for line in lines]
    return Group(*found) if found else Group()


# ---- figures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A measured table, for the terminal and for a page in docs/.

    Its title, column headers and rows of text; the columns named in `words` hold no numbers.
    """

    title: str
    headers: Sequence[str]
    rows: Sequence[Row]
    words: Sequence[str] = ()

    def drawn(self) -> Table:
        numbers = [header for header in self.headers if header not in self.words]
        made = table(*self.headers, title=self.title, right=numbers)
        for row in self.rows:
            made.add_row(*row)
        return made

    def markdown(self) -> str:
        rules = ["---" if header in self.words else "---:" for header in self.headers]
        lines = [_markdown_row(row) for row in (self.headers, rules, *self.rows)]
        return "\n".join([f"**{self.title[:1].upper()}{self.title[1:]}**", "", *lines])


def _markdown_row(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cells) + " |"


# ---- numbers ---------------------------------------------------------------------------------------------------------


def bytes_text(count: float) -> str:
    """`130 KiB`, `1.4 MiB`: three digits at most."""
    size, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while size >= 999.5 and len(units) > 1:
        size, units = size / 1024, units[1:]
    return f"{size:.0f} {units[0]}" if size >= 10 or units[0] == "B" else f"{size:.1f} {units[0]}"


def figure(value: float | None, digits: int = 4) -> str:
    """A number, or a dash where none was measured."""
    return "-" if value is None else f"{value:.{digits}f}"


# ---- programs --------------------------------------------------------------------------------------------------------


def program_summary(program: Program) -> Text:
    """One line: the model, how it was captured, how many of its attentions were matched."""
    matched, found = len(program.matched), len(program.sites)
    style = "green" if matched == found else "yellow"
    counts = f"{matched} of {found} attentions matched" if found else "no attention"
    return Text.assemble(
        (program.model_name, "bold"), f" by {program.captured_by}, {len(program.graph.nodes)} nodes, ", (counts, style)
    )


def record_text(record: Record, before: Record | None = None) -> RenderableType:
    """The program as it stood after one pass, headed by the pass and what it did to the operator counts."""
    head = [f"# after {record.name} ({record.seconds:.2f} s)"]
    if before is not None:
        head.append(f"# {counts_change(before.op_counts, record.op_counts) or 'same operators'}")
    return Text("\n".join([*head, record.text]))


def counts_change(before: dict[str, int], after: dict[str, int]) -> str:
    """`aten.view -12, aten.reshape +12`: which operators a pass took and added."""
    change = {name: after.get(name, 0) - before.get(name, 0) for name in sorted({*before, *after})}
    return ", ".join(f"{name} {count:+d}" for name, count in change.items() if count)


def excerpt_after(text: str, defined: Iterable[str], until: str) -> list[str]:
    """The lines of a program's text after the last one that defines a node of `defined`, up to one that holds `until`.

    Comments and indent are left out. This is how one attention is shown: what happens to its query, key and value.
    """
    lines = [line.strip() for line in text.splitlines() if not SCOPE.match(line)]
    heads = tuple(f"{name} = " for name in defined)
    start = max((at for at, line in enumerate(lines) if line.startswith(heads)), default=-1) + 1
    end = next((at for at in range(start, len(lines)) if until in lines[at]), len(lines) - 1)
    return lines[start : end + 1]


def code_line(line: str, bold: bool = False) -> Text:
    """One program line, indented, its shape dim."""
    code, mark, shape = line.partition("  # ")
    return Text.assemble("  ", (code, "bold" if bold else ""), (mark + shape, "dim"))


# ---- sites and plans -------------------------------------------------------------------------------------------------


def shape_text(site: Site) -> str:
    """`6/2x32`: query heads / kv heads x head dim."""
    spec = site.attention
    heads = f"{spec.heads}" if spec.heads == spec.kv_heads else f"{spec.heads}/{spec.kv_heads}"
    return f"{heads}x{spec.head_dim}"


def sites_table(sites: Sequence[Site | NoMatch], plan: Plan | None = None) -> Table:
    """Every attention of a model; with a plan, what each one becomes."""
    last = "plan" if plan is not None else "status"
    made = table("site", "module", "heads", "mask", "extras", last, right=("site",), whole=("module", "heads", last))
    for site in sites:
        if isinstance(site, NoMatch):
            made.add_row(str(site.index), site.module, "-", "-", "-", Text("refused", style="yellow"))
            continue
        label = plan.entry(site.index).label() if plan is not None else "matched"
        extras = " ".join(site.extras) or "-"
        made.add_row(
            str(site.index), site.module, shape_text(site), str(site.attention.mask), extras, Text(label, style="green")
        )
    return made


def refusals(sites: Sequence[Site | NoMatch], plan: Plan | None = None) -> list[str]:
    """Why each refused site was refused, and why the plan keeps a matched one as it is."""
    refused = [f"site {site.index} refused: {site.reason}" for site in sites if isinstance(site, NoMatch)]
    entries = plan.entries if plan is not None else ()
    return refused + [f"site {entry.site} kept: {entry.reason}" for entry in entries if entry.mixer == "keep"]


def site_details(site: Site | NoMatch, plan: Plan | None = None) -> RenderableType:
    """All that is known of one site: what was proved of it, or what stopped the match, step by step."""
    return _refused_details(site) if isinstance(site, NoMatch) else _matched_details(site, plan)


def _refused_details(site: NoMatch) -> RenderableType:
    parts: list[RenderableType] = [
        Text.assemble((f"site {site.index}", "bold"), f" {site.module}: ", ("refused", "yellow")),
        Text(site.reason),
        EMPTY,
    ]
    rows = table("", "")
    if site.source:
        rows.add_row("written in", site.source)
    rows.add_row("looked at", "" if site.chain else "\n".join(site.nodes))
    chain = [_chain_line(line, stopped=at == site.stopped_at) for at, line in enumerate(site.chain)]
    return Group(*parts, rows, *chain)


def _chain_line(line: str, stopped: bool) -> Text:
    code, _, shape = line.partition("  # ")
    mark = ("> ", "yellow") if stopped else ("  ", "")
    stop = ("  <- stopped here", "yellow") if stopped else ("", "")
    return Text.assemble(mark, (code, "bold" if stopped else ""), (f"  {shape}", "dim"), stop)


def _matched_details(site: Site, plan: Plan | None) -> RenderableType:
    spec, nodes = site.attention, site.nodes
    head = Text.assemble((f"site {site.index}", "bold"), f" {site.module}: ", ("matched", "green"))
    facts = {
        "heads": f"{spec.heads} query, {spec.kv_heads} key-value; head dim {spec.head_dim}, value dim {spec.value_dim}",
        "scale": f"{spec.scale:.6g}" + (f", soft-capped at {spec.softcap:g}" if spec.softcap else ""),
        "mask": f"{spec.mask}{' and padding' if spec.mask.padding else ''}, read by value {spec.mask.detail}".rstrip(),
        "positions": f"{spec.rope}, verified by value" if spec.rope else site.positions,
        "output": nodes.core,
        "query, key, value": f"{nodes.query}, {nodes.key}, {nodes.value}",
        "before rotation": f"{nodes.query_unrotated or 'not recovered'}, {nodes.key_unrotated or 'not recovered'}",
        "hidden state": f"{nodes.hidden or 'not recovered'} (width {spec.hidden_dim})",
        "projections": "\n".join(map(str, site.projected)) or "none proved",
        "parameters": "\n".join(site.projections) or "none found",
        "extras": ", ".join(site.extras) or "none",
    }
    if site.near_misses:
        facts["not established"] = "\n".join(site.near_misses)
    if plan is not None:
        entry = plan.entry(site.index)
        facts["plan"] = f"{entry.label()}: {entry.reason}"
    rows = table("", "")
    for name, fact in facts.items():
        rows.add_row(Text(name, style="dim"), Text(fact))
    return Group(head, Text("equal to the canonical attention on random numbers", style="dim"), rows)


def plan_table(plan: Plan) -> Table:
    """What every site becomes, and why."""
    made = table("site", "module", "mixer", "why", right=("site",))
    for entry in plan.entries:
        made.add_row(str(entry.site), entry.module, entry.label(), entry.reason)
    return made


# ---- recipes and reports ---------------------------------------------------------------------------------------------


def recipes_table(recipes: Sequence[Recipe]) -> Table:
    made = table("recipe", "what it does", "from")
    for recipe in recipes:
        made.add_row(Text(recipe.name, style="bold"), recipe.description, recipe.source)
    return made


def recipe_details(recipe: Recipe) -> RenderableType:
    """One recipe: which mixer each layer gets, its options, and how it is fitted."""
    rules = table("layers", "mixer", "options")
    for rule in recipe.rules:
        options = ", ".join(f"{key}={value}" for key, value in rule.options.items()) or "-"
        layers = f"{rule.share:.0%} {rule.layers}" if rule.score is not None else ""
        layers = layers or layers_text(rule.layers, rule.n, rule.first, rule.indices)
        rules.add_row(layers, rule.mixer, options)
    fit = recipe.fit
    fitting = (
        f"fitted on {fit.tokens:,} tokens in rows of {fit.length}, {fit.batch} at a time, rate {fit.learning_rate:g}"
        if fit.tokens
        else "nothing to fit"
    )
    head = Text.assemble((recipe.name, "bold"), f"  {recipe.source}" if recipe.source else "")
    searches = [
        Text(f"{name}: " + ", ".join(f"{key}={value}" for key, value in found.model_dump().items()))
        for name, found in recipe.searches.items()
    ]
    return Group(head, Text(recipe.description), EMPTY, rules, EMPTY, *searches, Text(fitting))


def layers_text(kind: str, n: int, first: int, indices: Sequence[int]) -> str:
    """`all`, `every 4 from 1`, `0, 5, 9`."""
    if kind == "every":
        return f"every {n} from {first}"
    return ", ".join(str(index) for index in indices) if kind == "list" else "all"


def report_table(report: Report) -> Table:
    """Errors of every site, before and after fitting, on data that was held out."""
    title = "relative MSE of each attention's output, on held-out data"
    numbers = ("start", "closed form", "fitted", "seconds")
    made = table("site", "module", "mixer", *numbers, title=title, right=("site", *numbers))
    for row in report.sites:
        seconds = f"{row.seconds:.1f}" if row.seconds else "-"
        errors = [figure(error) for error in (row.error_start, row.error_closed, row.error_fitted)]
        made.add_row(str(row.site), row.module, row.mixer, *errors, seconds)
    return made


def end_to_end_text(found: EndToEndReport) -> Text:
    """One line: the divergence before and after, and what was trained for how long."""
    kept = "" if found.kept else " (no better: the weights from before stay)"
    return Text(
        f"whole model: KL {found.kl_start:.4f} -> {found.kl_end:.4f} nats a token{kept}, {found.tokens:,} tokens, "
        f"mixers and {found.trained} ({found.parameters:,} parameters), {found.seconds:.0f} s"
    )
