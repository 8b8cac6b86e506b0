"""A plan measured without compiling it: the raised program, with mixers in the place of its attentions.

Sites run in order, each fed what the changed model before it gives. Between two of them only what later nodes read is
kept, so memory does not grow with the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx

from linearize.mixers import Mixer
from linearize.program import MASK, POSITIONS, TOKENS, Program
from linearize.rewriting.walk import evaluate
from linearize.spec import Site

CHUNK = 1024  # positions at once where distributions are compared


class Student:
    """A raised program whose sites are replaced by `mixers` (by site; the others keep the teacher's attention)."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._nodes = program.nodes_by_name()
        self._output: fx.Node = next(node for node in program.graph.nodes if node.op == "output").args[0]  # type: ignore[assignment]
        self._crossing = {site.index: crossing(program, self._nodes[site.nodes.core]) for site in program.matched}

    @torch.no_grad()
    def logits(self, ids: Tensor, mixers: Mapping[int, Mixer]) -> Tensor:
        """[B, T, V] for token ids int64 [B, T]."""
        given: dict[fx.Node, Any] = _inputs(self.program, ids.to(self.program.place))
        base = dict(given)
        shared = {need for mixer in mixers.values() for need in mixer.needs if "@" in need}
        for site in self.program.matched:
            lent = [self._node(site, need) for need in shared if need.endswith(f"@{site.index}")]
            base |= dict(zip(lent, evaluate(self.program.module, lent, given), strict=True))
            if site.index in mixers:
                core = self._nodes[site.nodes.core]
                given[core] = self._replaced(site, mixers[site.index], given)
            kept = self._crossing[site.index]
            given = base | dict(zip(kept, evaluate(self.program.module, kept, given), strict=True))
        return evaluate(self.program.module, [self._output], given)[0]  # type: ignore[no-any-return]

    def _replaced(self, site: Site, mixer: Mixer, given: dict[fx.Node, Any]) -> Tensor:
        wanted = [self._node(site, need) for need in ("query", "key", "value", *mixer.needs)]
        return mixer.run(evaluate(self.program.module, wanted, given))

    def _node(self, site: Site, need: str) -> fx.Node:
        """Of what a mixer needs; "key@3" is the key of site 3."""
        own, _, index = need.partition("@")
        holder = next(other for other in self.program.matched if str(other.index) == index) if index else site
        return self._nodes[getattr(holder.nodes, own)]


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
