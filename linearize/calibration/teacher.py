"""The teacher, streamed: one site at a time, over batches, from the activations that are live at the last cut.

A cut lies behind each site's attention. What is kept between cuts is, for every batch, only the activations that later
nodes still read (the residual stream); positions and masks are recomputed. Memory is tokens x width of that cut,
whatever the number of layers, and no layer is run twice for a later one.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, fx

from linearize.passes.match.region import read_flow
from linearize.program import MASK, POSITIONS, TOKENS, Program
from linearize.rewriting.walk import evaluate
from linearize.spec import Site


class TeacherStream:
    """Walks a raised program from site to site. `batches` are int64 [B, T] on any device."""

    def __init__(self, program: Program, batches: list[Tensor]) -> None:
        self.program, self.batches = program, [batch.to(program.device) for batch in batches]
        self._activations = read_flow(program).activations
        self._order = {node: index for index, node in enumerate(program.graph.nodes)}
        self._nodes = program.nodes_by_name()
        self._live: list[dict[fx.Node, Tensor]] = [{} for _ in batches]

    def site_values(self, site: Site, needs: tuple[str, ...], batch: int) -> tuple[list[Tensor], Tensor]:
        """([query, key, value, *needs], the teacher's output [B,H,T,dv]) of a site on one batch."""
        names = [site.nodes.query, site.nodes.key, site.nodes.value, *(getattr(site.nodes, need) for need in needs)]
        *inputs, output = self.values([*names, site.nodes.core], batch)
        return inputs, output

    def walk(self, sites: tuple[Site, ...]) -> Iterator[Site]:
        """Each site in order; between two of them every batch moves on to the cut behind the first."""
        for index, site in enumerate(sites):
            yield site
            if index + 1 < len(sites):
                self._advance(self._nodes[site.nodes.core])

    def logits(self, batch: int, replaced: dict[str, Tensor] | None = None) -> Tensor:
        """[B, T, V] of one batch, from wherever the walk stands; `replaced` gives nodes other values by name."""
        output = next(node for node in self.program.graph.nodes if node.op == "output")
        given = self._given(batch) | {self._nodes[name]: value for name, value in (replaced or {}).items()}
        return evaluate(self.program.module, [output.args[0]], given)[0]  # type: ignore[list-item]

    def values(self, names: list[str], batch: int) -> list[Tensor]:
        """Of any nodes behind the last cut, by name."""
        return evaluate(self.program.module, [self._nodes[name] for name in names], self._given(batch))

    def _advance(self, cut: fx.Node) -> None:
        position = self._order[cut]
        keep = [
            node for node in self._activations
            if self._order[node] <= position and any(self._order[user] > position for user in node.users)
            and isinstance(node.meta.get("val"), Tensor)
        ]  # fmt: skip
        for batch in range(len(self.batches)):
            values = evaluate(self.program.module, keep, self._given(batch))
            self._live[batch] = dict(zip(keep, values, strict=True))

    def _given(self, batch: int) -> dict[fx.Node, Tensor]:
        ids = self.batches[batch]
        made = {
            TOKENS: ids,
            MASK: torch.ones_like(ids),
            POSITIONS: torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous(),
        }
        inputs = {node: made[str(node.target)] for node in self.program.placeholders()}
        return {**inputs, **self._live[batch]}
