"""From scores and costs to a plan: solve, then measure a few plans near the solution and keep the best.

A budget is in bytes of state, or in seconds a decoded token on a target. 100 % of the bytes is what the source carries
compiled with every attention kept. Plans that were measured are compared on rows that no score was measured on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from torch import Tensor

from linearize.errors import RecipeError
from linearize.export.ways import Way
from linearize.plan import Fit, LowRankEntry, Plan, PlanEntry, PlanFigures
from linearize.planner.candidates import Candidate
from linearize.planner.choices import Choice, Known, entry_of, known_candidates, mixture_loss, site_options
from linearize.planner.costs import Base, base_cost, decode_calls, state_bytes
from linearize.planner.exports import check_states
from linearize.planner.measuring import measured
from linearize.planner.ranks import Ranks, saved_calls, weight_bytes
from linearize.planner.scores import Scores
from linearize.planner.sharing import Link, solve_linked
from linearize.planner.solver import Option
from linearize.planner.target import Target
from linearize.program import Program
from linearize.spec import Site

PREPARE = Fit(tokens=4096, length=512, batch=4, passes=0)
NOTHING = Fit(tokens=0)
KEEP = Candidate("keep")
NEIGHBOURS = 64
CLOSE = 1.5  # plans of at most so many times the solution's predicted loss are worth a measurement

Assignment = Mapping[int, Choice]  # by site


@dataclass(frozen=True)
class Budget:
    """`limit` bytes, or seconds where `seconds`; `text` is how the user wrote it."""

    limit: float
    seconds: bool = False
    text: str = ""


@dataclass
class Planner:
    """All that is known of one model at one context. Scores were measured on `train`, plans are on `held`; `pins` maps
    sites to what they must become; `ways` are exports that take all candidates, and `left_out` says by reason which
    mixers they do not take; `ranks` is what weights become, whatever the sites do."""

    teacher: Program
    context: int
    batch: int
    candidates: Mapping[int, Sequence[Candidate]]
    scores: Scores
    target: Target
    train: Sequence[Tensor] = ()
    held: Sequence[Tensor] = ()
    pins: Mapping[int, Candidate] = field(default_factory=dict)
    by_head: bool = True
    ways: Sequence[Way] = ()
    left_out: Mapping[str, Sequence[str]] = field(default_factory=dict)
    ranks: Sequence[Ranks] = ()

    def __post_init__(self) -> None:
        self._measured: dict[tuple[tuple[int, Choice], ...], float] = {}
        self._solutions: dict[Budget, list[dict[int, Option]]] = {}
        self._frontiers: dict[tuple[int, bool], list[Option]] = {}

    @cached_property
    def base(self) -> Base:
        return base_cost(self.teacher, self.batch)

    @cached_property
    def known(self) -> dict[int, list[Known]]:
        """By site."""
        return {
            site.index: known_candidates(site, self.candidates[site.index], self.scores.table[site.index])
            for site in self.teacher.matched
        }

    # ---- costs -------------------------------------------------------------------------------------------------------

    @cached_property
    def source_bytes(self) -> int:
        """Of the model compiled with every attention kept."""
        kept = sum(state_bytes(site.attention, "keep", {}, self.context, self.batch) for site in self.teacher.matched)
        return self.base.state_bytes + kept

    def bytes_of(self, assignment: Assignment) -> int:
        """Exactly what the compiled plan allocates."""
        return self.base.state_bytes + sum(
            int(self._site_bytes(site, assignment[site.index])) for site in self.teacher.matched
        )

    def _site_bytes(self, site: Site, choice: Choice) -> float:
        entry = entry_of(site, choice)
        return float(state_bytes(site.attention, entry.mixer, entry.options, self.context, self.batch))

    def _site_seconds(self, site: Site, choice: Choice) -> float:
        calls = decode_calls(self.base, [site], [entry_of(site, choice)], self.context, self.batch)
        return self.target.seconds(calls[len(self.base.calls) :], within=calls)

    def seconds_of(self, entries: Sequence[PlanEntry]) -> float:
        """Predicted, of one decoded token."""
        calls = decode_calls(self.base, self.teacher.matched, entries, self.context, self.batch)
        return self.target.seconds(calls) + self._rank_seconds

    @cached_property
    def low_rank(self) -> tuple[LowRankEntry, ...]:
        return tuple(entry for one in self.ranks for entry in one.entries)

    @cached_property
    def _rank_seconds(self) -> float:
        """What the ranks add to a decoded token: below 0 where they save."""
        gone, come = saved_calls(self.teacher, self.low_rank)
        return self.target.seconds(come, within=self.base.calls) - self.target.seconds(gone, within=self.base.calls)

    # ---- predicted loss ----------------------------------------------------------------------------------------------

    def predicted(self, assignment: Assignment) -> float:
        by_site = sum(self._site_loss(site, assignment[site.index]) for site in self.teacher.matched)
        return by_site + sum(one.loss for one in self.ranks)

    def _site_loss(self, site: Site, choice: Choice) -> float:
        return mixture_loss({one.candidate: one for one in self.known[site.index]}, choice)

    def frontier(self, site: Site, seconds: bool = False) -> list[Option]:
        """What the site can be, cheapest first, each losing less than the one before."""
        if (site.index, seconds) not in self._frontiers:
            known = [one for one in self.known[site.index] if one.candidate.of is None]
            if site.index in self.pins:
                known = [one for one in known if one.candidate == self.pins[site.index]]
            cost: Callable[[Site, Choice], float] = self._site_seconds if seconds else self._site_bytes
            self._frontiers[site.index, seconds] = site_options(site, known, cost, self.by_head and not seconds)
        return self._frontiers[site.index, seconds]

    def links(self, seconds: bool = False) -> list[Link]:
        """The caches that sites may read, where both ends are free to."""
        cost: Callable[[Site, Choice], float] = self._site_seconds if seconds else self._site_bytes
        found = []
        for site in self.teacher.matched:
            for known in self.known[site.index]:
                of, choice = known.candidate.of, (known.candidate,) * site.attention.kv_heads
                if of is not None and self.pins.get(site.index, known.candidate) == known.candidate:
                    found.append(Link(site.index, of, Option(known.loss, cost(site, choice), choice)))
        return [link for link in found if link.of in self.keeps(seconds)]

    def keeps(self, seconds: bool = False) -> dict[int, Option]:
        """Every site kept, of those that may be."""
        cost: Callable[[Site, Choice], float] = self._site_seconds if seconds else self._site_bytes
        made = {}
        for site in self.teacher.matched:
            choice = (KEEP,) * site.attention.kv_heads
            if any(one.candidate == KEEP for one in self.known[site.index]) and self.pins.get(site.index, KEEP) == KEEP:
                made[site.index] = Option(0.0, cost(site, choice), choice)
        return made

    # ---- solving -----------------------------------------------------------------------------------------------------

    def solve(self, budget: Budget) -> Assignment:
        """The assignment of least predicted loss.

        Raises:
            RecipeError: not even the cheapest one fits; it says what that takes. Or no export takes it.
        """
        found = self.solutions(budget)
        if not found:
            raise RecipeError(self._too_small(budget))
        allowed = [one for one in found if self.allowed(one)]
        check_states(not allowed, self.ways)
        return allowed[0]

    def solutions(self, budget: Budget) -> list[Assignment]:
        """One for every set of shared caches that is worth trying, and without any; the least loss first."""
        items = {site.index: self.frontier(site, budget.seconds) for site in self.teacher.matched}
        links = self.links(budget.seconds)
        forced = [link for link in links if link.site in self.pins]
        if budget not in self._solutions:
            limit = budget.limit - self._fixed(budget)
            self._solutions[budget] = solve_linked(items, self.keeps(budget.seconds), links, limit, forced)
        return [{site: option.choice for site, option in one.items()} for one in self._solutions[budget]]

    def _fixed(self, budget: Budget) -> float:
        """What is spent whatever the sites become."""
        if not budget.seconds:
            return float(self.base.state_bytes)
        return self.target.seconds(self.base.calls) + self._rank_seconds

    def _too_small(self, budget: Budget) -> str:
        items = [self.frontier(site, budget.seconds) for site in self.teacher.matched]
        shared = {link.site: link.option for link in self.links(budget.seconds) if link.site in self.pins}
        least = self._fixed(budget) + sum(
            item[0].cost if item else shared[site.index].cost
            for site, item in zip(self.teacher.matched, items, strict=True)
        )
        unit = "seconds a token" if budget.seconds else "bytes"
        return (
            f"no plan fits {budget.text or budget.limit}: the cheapest takes {least:,.6g} {unit}; "
            "raise the budget, pin less or allow more candidates"
        )

    def allowed(self, assignment: Assignment) -> bool:
        """Caches that are read are kept, and some site has a state where an export needs one."""
        sources = {choice[0].of for choice in assignment.values()} - {None}
        if any(assignment[of] != (KEEP,) * len(assignment[of]) for of in sources if of is not None):
            return False
        needed = any(way.needs_state for way in self.ways)
        return not needed or self.bytes_of(assignment) > self.base.state_bytes

    def neighbours(self, start: Assignment, budget: Budget) -> list[Assignment]:
        """Plans within the budget that differ from `start` by a step up at one site, paid by steps down at another, by
        other shared caches, or by one candidate everywhere; the most promising first, `NEIGHBOURS` of them."""
        most = CLOSE * self.predicted(start) + 1e-6
        others = [*self.solutions(budget)[:NEIGHBOURS], *self.uniform()]
        found = _distinct([start, *self._moved(start, budget, most), *others])
        losses = {_key(one): self.predicted(one) for one in found}
        fitting = [
            one for one in found
            if losses[_key(one)] <= most and self.cost(one, budget) <= budget.limit and self.allowed(one)
        ]  # fmt: skip
        return sorted(fitting, key=lambda one: losses[_key(one)])[:NEIGHBOURS]

    def _moved(self, start: Assignment, budget: Budget, most: float) -> list[Assignment]:
        """Plans after `_moves` that lose at most `most` and fit, by differences from `start` alone; sites that share a
        cache, and those whose cache it is, stay."""
        bound = {site for site, choice in start.items() if choice[0].of is not None}
        bound |= {choice[0].of for choice in start.values() if choice[0].of is not None}
        free = [site for site in self.teacher.matched if site.index not in bound]
        items = {site.index: self.frontier(site, budget.seconds) for site in free}
        place = {index: _place(items[index], start[index]) for index in items}
        lost = {index: [one.loss - item[place[index]].loss for one in item] for index, item in items.items()}
        spent = {index: [one.cost - item[place[index]].cost for one in item] for index, item in items.items()}
        room = budget.limit * (1 + 1e-9) - self.cost(start, budget)
        more = most - self.predicted(start)
        near = [
            (loss, moves) for moves in _moves(place, items)
            if (loss := sum(lost[index][at] for index, at in moves)) <= more
            and sum(spent[index][at] for index, at in moves) <= room
        ]  # fmt: skip
        near = sorted(near, key=lambda one: one[0])[:NEIGHBOURS]
        return [{**start, **{index: items[index][at].choice for index, at in moves}} for _, moves in near]

    def uniform(self) -> list[Assignment]:
        """One candidate at every site, for all that every site can take; pinned sites as pinned."""
        sites = self.teacher.matched
        common = [one.candidate for one in self.known[sites[0].index]]
        for site in sites:
            can = {one.candidate for one in self.known[site.index]}
            common = [one for one in common if one in can]
        made = [{site.index: (one,) * site.attention.kv_heads for site in sites} for one in common]
        pinned = {
            site.index: (self.pins[site.index],) * site.attention.kv_heads
            for site in sites if site.index in self.pins
        }  # fmt: skip
        return [{**one, **pinned} for one in made]

    def cost(self, assignment: Assignment, budget: Budget) -> float:
        if not budget.seconds:
            return float(self.bytes_of(assignment))
        return self.seconds_of([entry_of(site, assignment[site.index]) for site in self.teacher.matched])

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def measure(self, assignments: Sequence[Assignment]) -> list[float]:
        """KL on the held-out rows of each, in nats a token; each is measured once."""
        wanted = [one for one in _distinct(assignments) if _key(one) not in self._measured]
        if wanted:
            losses = measured(self.teacher, self.train, self.held, [self.entries(one, scored=True) for one in wanted],
                              self.low_rank)  # fmt: skip
            self._measured |= {_key(one): loss for one, loss in zip(wanted, losses, strict=True)}
        return [self._measured[_key(one)] for one in assignments]

    def best(self, budget: Budget, measurements: int = 6) -> Assignment:
        """The solution, or what measured better among the `measurements` most promising plans around it."""
        solution = self.solve(budget)
        if measurements < 2 or not self.held:
            return solution
        pool = [solution, *(one for one in self.neighbours(solution, budget) if _key(one) != _key(solution))]
        pool = pool[:measurements]
        losses = self.measure(pool)
        return pool[min(range(len(pool)), key=lambda at: (losses[at], at))]

    # ---- plans -------------------------------------------------------------------------------------------------------

    def entries(self, assignment: Assignment, scored: bool = False) -> list[PlanEntry]:
        return [
            entry_of(site, assignment[site.index], self._reason(site, assignment[site.index]), scored)
            for site in self.teacher.matched
        ]

    def _reason(self, site: Site, choice: Choice) -> str:
        pinned = "pinned; " if site.index in self.pins else ""
        size = self._site_bytes(site, choice)
        return f"{pinned}predicted loss {self._site_loss(site, choice):.2g}, {size:,.0f} bytes"

    def plan(self, assignment: Assignment, budget: Budget, source_seconds: float | None = None) -> Plan:
        """As a file would hold it, with what is predicted and, where it was measured, what it loses."""
        entries = self.entries(assignment)
        loss = self._measured.get(_key(assignment))
        figures = PlanFigures(
            context=self.context, batch=self.batch, budget=budget.text, target=self.target.name,
            state_bytes=self.bytes_of(assignment), source_bytes=self.source_bytes,
            predicted_loss=self.predicted(assignment), measured_loss=loss,
            predicted_seconds=self.seconds_of(entries), source_seconds=source_seconds,
            exports=tuple(way.name for way in self.ways) or None,
            weight_bytes=self.base.weight_bytes + weight_bytes(self.teacher, self.low_rank) if self.low_rank else None,
            source_weight_bytes=self.base.weight_bytes if self.low_rank else None,
            estimate="second order" if self.scores.second_order else None,
        )  # fmt: skip
        learning = any(learns(entry) for entry in entries)
        return Plan(recipe="plan", figures=figures, fit=PREPARE if learning else NOTHING, entries=tuple(entries),
                    low_rank=self.low_rank)  # fmt: skip


def learns(entry: PlanEntry) -> bool:
    """Whether the mixer (or a part of it) is to be prepared or fitted."""
    from linearize.mixers import mixer_class

    if entry.mixer == "mixture":
        return any(mixer_class(part["mixer"]).fits for part in entry.options["parts"])
    return mixer_class(entry.mixer).fits


def _place(options: Sequence[Option], choice: Choice) -> int:
    return next((at for at, option in enumerate(options) if option.choice == choice), 0)


def _moves(place: Mapping[int, int], items: Mapping[int, Sequence[Option]]) -> Iterator[tuple[tuple[int, int], ...]]:
    """(site, place on its frontier) of what changes: up to three steps up at one site, alone or with up to six steps
    down at another."""
    for up, at in place.items():
        for risen in range(at + 1, min(at + 4, len(items[up]))):
            yield ((up, risen),)
            for down, other in place.items():
                if down != up:
                    yield from (((up, risen), (down, lower)) for lower in range(other - 1, max(other - 7, -1), -1))


def _key(assignment: Assignment) -> tuple[tuple[int, Choice], ...]:
    return tuple(sorted(assignment.items(), key=lambda item: item[0]))


def _distinct(assignments: Iterable[Assignment]) -> list[Assignment]:
    return list({_key(one): one for one in assignments}.values())
