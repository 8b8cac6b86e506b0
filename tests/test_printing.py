"""What is drawn says what the data says, and fits 80 columns."""

import io

import pytest
from rich.console import Console, RenderableType

from linearize import printing
from linearize.plan import Plan, PlanEntry
from linearize.program import Record
from linearize.recipe import Fit, LayerRule, Recipe
from linearize.report import Report, SiteReport
from linearize.spec import AttentionSpec, MaskSpec, NoMatch, RopeSpec, Site, SiteNodes


def drawn(item: RenderableType, width: int = 80) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(item)
    return console.file.getvalue()  # type: ignore[attr-defined]


def site(index: int = 0, heads: int = 32, kv_heads: int = 8, **spec: object) -> Site:
    options: dict[str, object] = {
        "heads": heads, "kv_heads": kv_heads, "head_dim": 128, "value_dim": 128, "hidden_dim": 4096, "scale": 128**-0.5,
        "mask": MaskSpec("sliding", 4096, padding=True), "rope": RopeSpec(128, "half"),
    }  # fmt: skip
    nodes = SiteNodes("sdpa", "query", "key", "value", hidden="norm", query_unrotated="q0", key_unrotated="k0")
    return Site(
        index=index,
        module=f"model.layers.{index}.self_attn",
        attention=AttentionSpec(**{**options, **spec}),  # type: ignore[arg-type]
        nodes=nodes,
        projections=("q_proj.weight", "k_proj.weight"),
        extras=("gqa", "rope-half(128)", "qk-norm", "padding"),
    )


REFUSED = NoMatch(
    index=1,
    module="model.layers.1.self_attn",
    reason="its mask is other: only causal and sliding masks are raised",
    nodes=("mask", "sdpa"),
    source="modeling_odd.py:12",
    chain=("mask = where [1, 1, s0, s0]", "sdpa = scaled_dot_product_attention [s1, 4, s0, 8]"),
)
PLAN = Plan(
    recipe="lolcats",
    entries=(PlanEntry(site=0, module="model.layers.0.self_attn", mixer="lolcats", options={"window": 64}),),
)


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1023, "1.0 KiB"), (133_264, "130 KiB"), (1_500_000, "1.4 MiB"), (2**40, "1.0 TiB")],
)
def test_bytes_have_three_digits_at_most(count: int, text: str) -> None:
    assert printing.bytes_text(count) == text


def test_a_figure_that_was_not_measured_is_a_dash() -> None:
    assert (printing.figure(None), printing.figure(0.12345), printing.figure(2.0, 1)) == ("-", "0.1235", "2.0")


def test_sites_are_one_line_each_at_120_columns_and_name_the_plan() -> None:
    text = drawn(printing.sites_table([site(), REFUSED], PLAN), width=120)
    _, first, second = text.splitlines()
    for part in ("model.layers.0.self_attn", "32/8x128", "sliding(4096)", "gqa rope-half(128)", "lolcats{window=64}"):
        assert part in first
    assert second.split() == ["1", "model.layers.1.self_attn", "-", "-", "-", "refused"]


def test_names_stay_whole_at_80_columns() -> None:
    lines = drawn(printing.sites_table([site(), REFUSED], PLAN)).splitlines()
    assert max(map(len, lines)) <= 80
    assert any("model.layers.0.self_attn" in line and "lolcats{window=64}" in line for line in lines)


def test_without_a_plan_a_site_is_matched_or_refused() -> None:
    text = drawn(printing.sites_table([site(heads=8, kv_heads=8), REFUSED]))
    assert "8x128" in text
    assert "matched" in text
    assert "refused" in text


def test_refusals_are_told_with_their_reasons_and_kept_sites_too() -> None:
    kept = Plan(entries=(PlanEntry(site=0, module="m", mixer="keep", reason="lizard needs hidden"),))
    assert printing.refusals([site(), REFUSED], kept) == [
        "site 1 refused: its mask is other: only causal and sliding masks are raised",
        "site 0 kept: lizard needs hidden",
    ]


def test_details_of_a_refused_site_show_every_step_and_the_source() -> None:
    text = drawn(printing.site_details(REFUSED))
    for part in (*REFUSED.chain, REFUSED.reason, REFUSED.source):
        assert part in text


def test_details_of_a_matched_site_show_what_was_proved() -> None:
    text = drawn(printing.site_details(site(softcap=50.0), PLAN))
    for part in (
        "32 query, 8 key-value",
        "0.0883883, soft-capped at 50",
        "sliding(4096) and padding",
        "rope-half(128)",
    ):
        assert part in text
    for part in ("q0, k0", "norm (width 4096)", "q_proj.weight", "lolcats{window=64}"):
        assert part in text


def test_a_plan_is_drawn_with_its_reasons() -> None:
    plan = Plan(entries=(PlanEntry(site=3, module="m", mixer="keep", reason="[odd] markup"),))
    assert "[odd] markup" in drawn(printing.plan_table(plan))


def test_a_record_is_headed_by_its_pass_and_the_change_of_operators() -> None:
    before = Record("capture", "def f():", {"aten.view": 3, "aten.add": 1}, 0.5)
    after = Record("reshape_views", "def f():\n    return [red]", {"aten.reshape": 3, "aten.add": 1}, 0.25)
    text = drawn(printing.record_text(after, before))
    assert text.splitlines() == [
        "# after reshape_views (0.25 s)", "# aten.reshape +3, aten.view -3", "def f():", "    return [red]",
    ]  # fmt: skip
    assert "same operators" in drawn(printing.record_text(before, before))


def test_an_excerpt_starts_behind_the_inputs_and_ends_at_the_product() -> None:
    text = (
        "def f(x):\n    # layer.attn\n    q = linear(x)\n    k = linear(x)\n    s = softmax(q, k)\n"
        "    # layer.attn.o\n    o = linear(s)\n    y = add(x, o)"
    )
    assert printing.excerpt_after(text, ("q", "k"), until="linear(") == ["s = softmax(q, k)", "o = linear(s)"]
    assert printing.excerpt_after("a = f()\nb = g()", ("none",), until="nothing") == ["a = f()", "b = g()"]


def test_recipes_show_rules_and_fitting() -> None:
    rules = (
        LayerRule(mixer="window", options={"window": 8}),
        LayerRule(mixer="keep", layers="every", n=4, first=1),
        LayerRule(mixer="keep", layers="list", indices=(0, 2)),
    )
    text = drawn(printing.recipe_details(Recipe(name="mine", description="Mine.", rules=rules, fit=Fit(tokens=2048))))
    for part in ("mine", "window=8", "every 4 from 1", "0, 2", "2,048 tokens"):
        assert part in text
    assert "Mine." in drawn(printing.recipes_table([Recipe(name="mine", description="Mine.", rules=rules)]))


def test_a_report_shows_errors_before_and_after_and_dashes_where_nothing_was_measured() -> None:
    rows = [
        SiteReport(
            site=0, module="m.0", mixer="lolcats", error_start=0.5, error_closed=0.25, error_fitted=0.125, seconds=3.21
        ),
        SiteReport(site=1, module="m.1", mixer="window{window=8}"),
    ]
    lines = drawn(printing.report_table(Report(sites=rows))).splitlines()
    assert lines[2].split() == ["0", "m.0", "lolcats", "0.5000", "0.2500", "0.1250", "3.2"]
    assert lines[3].split() == ["1", "m.1", "window{window=8}", "-", "-", "-", "-"]
