"""Sites that read another's cache: the choice against trying everything, what may read what, and the plan compiled."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from linearize.errors import RecipeError
from linearize.mixers import build_mixer
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.planner.costs import base_cost, decode_calls
from linearize.planner.counting import Counting
from linearize.planner.make import Wishes, make_planner
from linearize.planner.planning import Budget, Planner
from linearize.planner.sharing import Link, solve_linked
from linearize.planner.solver import Option
from linearize.planner.student import Student
from linearize.planner.target import H200
from tests import zoo

LENGTH = 32


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("LINEARIZE_CACHE", str(folder))
        yield folder


def planner(**wishes: Any) -> Planner:
    rows = [zoo.tokens(1, LENGTH, seed) for seed in range(4)]
    return make_planner(zoo.captured("llama"), 256, H200, data=rows, tokens=2 * LENGTH, wishes=Wishes(**wishes))


def problem(generator: random.Random) -> tuple[dict[int, list[Option]], dict[int, Option], list[Link]]:
    """Five sites: options that lose less for more, keeping at 100, and a link to two earlier sites each."""
    items, keeps = {}, {}
    for site in range(5):
        costs = sorted(generator.randrange(5, 90) for _ in range(4))
        keeps[site] = Option(0.0, 100.0, "keep")
        items[site] = [*(Option(2.0 ** -(cost / 20) * generator.uniform(0.5, 2), cost) for cost in costs), keeps[site]]
    links = [
        Link(site, of, Option(generator.uniform(0.0, 0.3), 1.0, f"share {of}"))
        for site in range(1, 5)
        for of in generator.sample(range(site), min(site, 2))
    ]
    return items, keeps, links


def everything(
    items: dict[int, list[Option]], keeps: dict[int, Option], links: Sequence[Link], budget: float
) -> float:
    choices = [[*items[site], *(link for link in links if link.site == site)] for site in items]
    best = float("inf")
    for one in itertools.product(*choices):
        hubs = {choice.of for choice in one if isinstance(choice, Link)}
        options = [choice.option if isinstance(choice, Link) else choice for choice in one]
        fits = sum(option.cost for option in options) <= budget
        if fits and all(one[hub] is keeps[hub] for hub in hubs):
            best = min(best, sum(option.loss for option in options))
    return best


def test_sharing_is_found_about_where_trying_everything_finds_it() -> None:
    generator, equal, sharing = random.Random(0), 0, 0
    for _ in range(40):
        items, keeps, links = problem(generator)
        budget = sum(item[0].cost for item in items.values()) + generator.uniform(20, 300)
        found = solve_linked(items, keeps, links, budget)[0]
        assert sum(option.cost for option in found.values()) <= budget
        for site, option in found.items():
            if str(option.choice).startswith("share"):
                assert found[int(option.choice.split()[1])] is keeps[int(option.choice.split()[1])], site
                sharing += 1
        loss, best = sum(option.loss for option in found.values()), everything(items, keeps, links, budget)
        without = sum(option.loss for option in solve_linked(items, keeps, [], budget)[0].values())
        assert best * 0.999 <= loss <= without + 1e-12
        equal += loss <= best * 1.001 + 1e-12
    assert sharing > 10
    assert equal >= 36


def test_what_is_forced_is_in_every_solution() -> None:
    items, keeps, links = problem(random.Random(3))
    items[links[0].site] = []
    for found in solve_linked(items, keeps, links, 1000.0, forced=links[:1]):
        assert found[links[0].site] is links[0].option
        assert found[links[0].of] is keeps[links[0].of]
    assert solve_linked(items, keeps, links, 50.0, forced=links[:1]) == []


def test_a_cache_that_is_read_is_kept_at_every_budget(cache: Path) -> None:
    """Sharing and keeping alone: half the caches go where the budget is short, and never the one that is read."""
    found = planner(mixers=("share",))
    shared = found.solve(Budget(0.6 * found.source_bytes))
    assert [entry.label() for entry in found.entries(shared)] == ["keep", "share{of=0}"]
    free = planner()
    for share in (0.3, 0.6):
        budget = Budget(share * free.source_bytes)
        for one in free.neighbours(free.solve(budget), budget):
            assert free.allowed(one)


def test_a_shared_plan_compiles_to_what_was_predicted(cache: Path, tmp_path: Path) -> None:
    found = planner(pins={1: ("share", {"of": 0})})
    budget = Budget(0.6 * found.source_bytes)
    solution = found.solve(budget)
    plan = found.plan(solution, budget)
    compiled = zoo.compile_again("llama", plan=plan.save(tmp_path / "plan.json"), tokens=0)
    assert plan.figures is not None
    assert compiled.state_bytes(1, 256) == plan.figures.state_bytes
    assert Plan.load(tmp_path / "plan.json") == plan
    program = run_pipeline(zoo.captured("llama"), [RaiseAttention()])
    mixers = {1: build_mixer("share", program.matched[1].attention, {"of": 0})}
    ids = zoo.tokens(1, 24)
    with torch.no_grad():
        torch.testing.assert_close(Student(program).logits(ids, mixers), compiled(ids).logits)


def test_a_site_that_shares_projects_its_queries_alone() -> None:
    program = run_pipeline(zoo.captured("llama"), [RaiseAttention()])
    entries = [
        PlanEntry(site=0, module=program.matched[0].module, mixer="keep"),
        PlanEntry(site=1, module=program.matched[1].module, mixer="share", options={"of": 0}),
    ]
    compiled = zoo.compile_again("llama", plan=Plan(entries=tuple(entries)), tokens=0)
    _, state = compiled.step(zoo.tokens(1, 9))
    with torch.no_grad(), Counting() as real:
        compiled.step(zoo.tokens(1, 1), state)
    planned = decode_calls(base_cost(program), program.matched, entries, 9, 1)
    counts = [sum(call.name == "mm" for call in calls) for calls in (planned, real.calls)]
    assert counts[0] == counts[1]


@pytest.mark.parametrize(
    ("wishes", "message"),
    [
        ({"pins": {1: ("share", {"of": 0}), 0: ("window", {"window": 8})}}, "site 0 .* becomes window and has none"),
        ({"pins": {1: ("share", {"of": 0})}, "never": ("keep",)}, "shares the cache of site 0, which is never kept"),
        ({"pins": {0: ("share", {"of": 1})}}, "reads the cache of a site before it, and 1 is none"),
        ({"pins": {1: ("share", {"of": 0})}, "exports": ("genai",)}, "the pin is refused by an export"),
    ],
)
def test_a_pin_that_cannot_share_is_refused(cache: Path, wishes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planner(**wishes)
