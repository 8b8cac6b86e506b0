"""The teacher, streamed: one block at a time, over all batches, from what crosses the last cut (`blocks`).

What is kept between blocks is, for every batch, what later nodes still read (the residual stream), in memory or on
disk (`spill`); of a model that stays on disk the weights of the block that runs are in memory, and no others. No layer
is run twice for a later one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, fx

from linearize.calibration.blocks import Blocks, is_finite
from linearize.calibration.parallel import rank, world
from linearize.calibration.spill import Spill
from linearize.errors import DataError
from linearize.program import MASK, POSITIONS, TOKENS, Program
from linearize.rewriting.walk import evaluate
from linearize.spec import Site
from linearize.weights import give_memory_back


class TeacherStream:
    """Walks a raised program from site to site. `batches` are int64 [B, T] on any device.

    The walk is lazy: a site of which no value is asked is passed without running anything.
    """

    def __init__(
        self, program: Program, batches: Sequence[Tensor], spill: Spill | None = None, blocks: Blocks | None = None
    ) -> None:
        self.program, self.batches = program, batches
        self.blocks = blocks or Blocks(program)
        self.first, self.step, self.total = 0, 1, len(batches)
        self._nodes = program.nodes_by_name()
        self._spill = spill or Spill()
        self._cut = self._wanted = 0

    def part_of(self, total: int) -> TeacherStream:
        """Say that the batches are this process's of `total` (`parallel.share`)."""
        self.first, self.step, self.total = rank(), world(), total
        return self

    def place(self, batch: int) -> int:
        """The number of a batch among those of all processes."""
        return self.first + batch * self.step

    def site_values(self, site: Site, needs: tuple[str, ...], batch: int) -> tuple[list[Tensor], Tensor]:
        """([query, key, value, *needs], the teacher's output [B,H,T,dv]) of a site on one batch; a need "key@3" is the
        key of site 3, for which all before it runs again."""
        names = [self._name(site, need) for need in ("query", "key", "value", *needs)]
        *inputs, output = self.values([*names, site.nodes.core], batch)
        return inputs, output

    def _name(self, site: Site, need: str) -> str:
        own, _, index = need.partition("@")
        holder = next(other for other in self.program.matched if str(other.index) == index) if index else site
        return str(getattr(holder.nodes, own))

    def walk(self, sites: tuple[Site, ...]) -> Iterator[Site]:
        """Each site in order; when a value of it is asked for, every batch moves on to the cut before it."""
        for site in sites:
            self._wanted = self.blocks.index(site)
            yield site

    def logits(self, batch: int, replaced: dict[str, Tensor] | None = None) -> Tensor:
        """[B, T, V] of one batch, from wherever the walk stands; `replaced` gives nodes other values by name."""
        output = next(node for node in self.program.graph.nodes if node.op == "output")
        given = self._given(batch) | {self._nodes[name]: value for name, value in (replaced or {}).items()}
        return evaluate(self.program.module, [output.args[0]], given)[0]  # type: ignore[list-item]

    def values(self, names: list[str], batch: int) -> list[Tensor]:
        """Of any nodes behind the last cut, by name."""
        return evaluate(self.program.module, [self._nodes[name] for name in names], self._given(batch))

    def _move(self) -> None:
        """To the cut that is wanted, from the nearest one that is known."""
        crossing = [len(nodes) for nodes in self.blocks.crossing]
        known = self._spill.newest(self._wanted, len(self.batches), crossing)
        self._cut = max(known, self._cut) if self._cut <= self._wanted else known
        while self._cut < self._wanted:
            self._advance()
        self._hold()

    def _advance(self) -> None:
        self._hold()
        cut, keep = self._cut + 1, self.blocks.crossing[self._cut + 1]
        writer = self._spill.writer(cut)
        for batch in range(len(self.batches)):
            values = evaluate(self.program.module, keep, self._made(batch))
            for node, value in zip(keep, values, strict=True):
                self._check(node, value, batch)
            writer.add(values)
        writer.close()
        self._spill.drop(self._cut)
        self._cut = cut

    def _hold(self) -> None:
        """The weights of the block behind the cut, and no others."""
        if self.program.weights is not None:
            self.program.weights.hold(self.blocks.parameters(self._cut))
            give_memory_back()

    def _check(self, node: fx.Node, value: Tensor, batch: int) -> None:
        if value.is_floating_point() and not is_finite(value):
            site = self.blocks.sites[self._cut]
            raise DataError(
                f"the teacher's activations are not finite before site {site.index} ({site.module}), at {node.name} on "
                f"batch {batch}: its weights, its dtype or this text break it; look at it before fitting to it"
            )

    def given(self, batch: int) -> dict[fx.Node, Tensor]:
        """By node: the inputs, and what crosses the cut at which the walk stands."""
        return self._given(batch)

    def _given(self, batch: int) -> dict[fx.Node, Tensor]:
        if self._cut != self._wanted:
            self._move()
        return self._made(batch)

    def _made(self, batch: int) -> dict[fx.Node, Tensor]:
        ids = self.batches[batch].to(self.program.place)
        made = {
            TOKENS: ids,
            MASK: torch.ones_like(ids),
            POSITIONS: torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous(),
        }
        inputs = {node: made[str(node.target)] for node in self.program.placeholders()}
        if not self._cut:
            return inputs
        crossing = self._spill.read(self._cut, batch)
        kept = dict(zip(self.blocks.crossing[self._cut], (tensor.to(ids.device) for tensor in crossing), strict=True))
        return {**inputs, **kept}
