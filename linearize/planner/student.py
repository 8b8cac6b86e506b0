"""A plan measured without compiling it: the raised program, with mixers in the place of its attentions.

Sites run in order, each fed what the changed model before it gives. Between two of them only what later nodes read is
kept, so memory does not grow with the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from linearize.mixers import Mixer
from linearize.program import MASK, POSITIONS, TOKENS, Program
from linearize.rewriting.walk import cone, evaluate
from linearize.spec import Site
from linearize.weights import give_memory_back

CHUNK = 1024  # positions at once where distributions are compared


class Student:
    """A raised program whose sites are replaced by `mixers` (by site; the others keep the teacher's attention)."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._nodes = program.nodes_by_name()
        self._output: fx.Node = next(node for node in program.graph.nodes if node.op == "output").args[0]  # type: ignore[assignment]
        self._crossing = {site.index: crossing(program, self._nodes[site.nodes.core]) for site in program.matched}

    @torch.no_grad()
    def logits(
        self, ids: Tensor, mixers: Mapping[int, Mixer], weights: Mapping[fx.Node, Tensor] | None = None
    ) -> Tensor:
        """[B, T, V] for token ids int64 [B, T]; `weights` stand in the place of those that nodes read."""
        run = Run(self, ids, mixers, weights)
        for site in self.program.matched:
            run.advance(site)
        return run.logits()

    def parameters(self, site: Site | None) -> set[str]:
        """Names of what is read from the site before up to the site's output; None: from the last one on."""
        sites = self.program.matched
        place = sites.index(site) if site is not None else len(sites)
        before = self._crossing[sites[place - 1].index] if place else []
        ends = [self._output] if site is None else [*self._crossing[site.index], *self._inputs_of(site)]
        return {str(node.target) for node in cone(ends, before) if node.op == "get_attr"}

    def _inputs_of(self, site: Site) -> list[fx.Node]:
        return [self._node(site, need) for need in ("query", "key", "value")]

    def _replaced(self, site: Site, mixer: Mixer, given: dict[fx.Node, Any]) -> Tensor:
        wanted = [self._node(site, need) for need in ("query", "key", "value", *mixer.needs)]
        return mixer.run(evaluate(self.program.module, wanted, given))

    def _node(self, site: Site, need: str) -> fx.Node:
        """Of what a mixer needs; "key@3" is the key of site 3."""
        own, _, index = need.partition("@")
        holder = next(other for other in self.program.matched if str(other.index) == index) if index else site
        return self._nodes[getattr(holder.nodes, own)]


class Run:
    """One plan on one batch, from site to site."""

    def __init__(
        self, student: Student, ids: Tensor, mixers: Mapping[int, Mixer],
        weights: Mapping[fx.Node, Tensor] | None = None,
    ) -> None:  # fmt: skip
        self.student, self.module, self.mixers = student, student.program.module, mixers
        self._base = _inputs(student.program, ids.to(student.program.place)) | dict(weights or {})
        self._given: dict[fx.Node, Any] = dict(self._base)
        self._lent = {need for mixer in mixers.values() for need in mixer.needs if "@" in need}

    def advance(self, site: Site) -> None:
        """Past the site's output; what other sites will read of it is kept."""
        student = self.student
        lent = [student._node(site, need) for need in self._lent if need.endswith(f"@{site.index}")]
        self._base |= dict(zip(lent, evaluate(self.module, lent, self._given), strict=True))
        if site.index in self.mixers:
            core = student._nodes[site.nodes.core]
            self._given[core] = student._replaced(site, self.mixers[site.index], self._given)
        kept = student._crossing[site.index]
        self._given = self._base | dict(zip(kept, evaluate(self.module, kept, self._given), strict=True))

    def logits(self) -> Tensor:
        """[B, T, V], behind the last site."""
        return evaluate(self.module, [self.student._output], self._given)[0]  # type: ignore[no-any-return]


def crossing(program: Program, cut: fx.Node) -> list[fx.Node]:
    """Tensors made up to `cut` that nodes behind it read, parameters and inputs apart."""
    order = {node: index for index, node in enumerate(program.graph.nodes)}
    return [
        node for node in program.graph.nodes
        if node.op not in ("placeholder", "get_attr") and order[node] <= order[cut]
        and any(order[user] > order[cut] for user in node.users) and isinstance(node.meta.get("val"), Tensor)
    ]  # fmt: skip


def _inputs(program: Program, ids: Tensor) -> dict[fx.Node, Any]:
    positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
    made = {TOKENS: ids, MASK: torch.ones_like(ids), POSITIONS: positions}
    return {node: made[str(node.target)] for node in program.placeholders()}


def divergence(teacher: Tensor, student: Tensor) -> float:
    """Sum over all positions of KL(teacher || student) in nats, from logits [B, T, V], a piece at a time."""
    total = 0.0
    with torch.no_grad():
        for expected, actual in zip(teacher.split(CHUNK, 1), student.split(CHUNK, 1), strict=True):
            p, q = expected.float().log_softmax(-1), actual.float().log_softmax(-1)
            total += (p.exp() * (p - q)).sum(-1).double().sum().item()
    return total


Plans = Sequence[Mapping[int, Mixer]]


def losses_of(
    student: Student, batches: Sequence[Tensor], plans: Plans, weights: Mapping[fx.Node, Tensor] | None = None
) -> list[list[float]]:
    """[plan][batch]: mean KL(teacher || plan) in nats a token, one run at a time; `weights` are every plan's."""
    losses: list[list[float]] = [[] for _ in plans]
    for ids in batches:
        expected = student.logits(ids, {})
        for found, mixers in zip(losses, plans, strict=True):
            changed = mixers or weights
            total = divergence(expected, student.logits(ids, mixers, weights)) if changed else 0.0
            found.append(max(total, 0.0) / ids.numel())
    return losses


@torch.no_grad()
def losses_streamed(student: Student, batches: Sequence[Tensor], plans: Plans) -> list[list[float]]:
    """The same with all plans and batches from site to site together, so that every weight is read once and those of
    one block are in memory; what crosses from block to block is, of all runs."""
    weights, runs = student.program.weights, [[Run(student, ids, mixers) for mixers in ({}, *plans)] for ids in batches]
    assert weights is not None
    for site in student.program.matched:
        weights.hold(student.parameters(site))
        give_memory_back()
        for run in (one for row in runs for one in row):
            run.advance(site)
    weights.hold(student.parameters(None))
    give_memory_back()
    losses: list[list[float]] = [[] for _ in plans]
    for ids, (teacher, *others) in zip(batches, runs, strict=True):
        expected = teacher.logits()
        for found, run in zip(losses, others, strict=True):
            total = divergence(expected, run.logits()) if run.mixers else 0.0
            found.append(max(total, 0.0) / ids.numel())
    weights.hold(())
    return losses
