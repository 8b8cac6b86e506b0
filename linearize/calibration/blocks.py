"""A raised program cut into blocks, one a site: where the cuts are, what crosses them, and what a block needs.

Block i runs from cut i to cut i + 1. A cut stands before a site's query, key and value and behind the attention of the
site before, at the place where the fewest bytes a token cross it: the residual stream, in most models. Positions and
masks do not cross: they are made again from the token ids.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

import torch
from torch import Tensor, fx

from linearize.passes.match.region import read_flow
from linearize.program import TOKENS, Program
from linearize.rewriting.walk import concrete_shape, cone, shape_of
from linearize.spec import Site
from linearize.tensorfile import bytes_of

BATCH, LENGTH = 2, 13  # any: bytes are compared only


class Blocks:
    """Cut 0 is the graph's start, where nothing crosses; cut i + 1 stands before site i."""

    def __init__(self, program: Program) -> None:
        self.program, self.sites = program, program.matched
        self._nodes = list(program.graph.nodes)
        self._order = {node: index for index, node in enumerate(self._nodes)}
        self._names = program.nodes_by_name()
        activations = read_flow(program).activations
        self._last = {node: max((self._order[user] for user in node.users), default=-1) for node in activations}
        self.output = next(node for node in reversed(self._nodes) if node.op == "output")
        self._places = self._choose()
        self.crossing: list[list[fx.Node]] = [[], *(self._crossing(place) for place in self._places)]

    def index(self, site: Site) -> int:
        """The cut that stands before a site."""
        return next(index for index, own in enumerate(self.sites) if own.index == site.index) + 1

    def width(self, cut: int, batch: int, length: int) -> int:
        """Bytes that cross it, for `batch` rows of `length` tokens."""
        return sum(self._bytes(node, batch, length) for node in self.crossing[cut])

    def ends(self, cut: int) -> list[fx.Node]:
        """What crosses the next cut; the logits, where there is none."""
        last: fx.Node = self.output.args[0]  # type: ignore[assignment]
        return [last] if cut + 1 == len(self.crossing) else self.crossing[cut + 1]

    def inside(self, cut: int) -> set[fx.Node]:
        """All that is computed or read behind a cut up to the next, or to the logits."""
        return cone(self.ends(cut), self.crossing[cut])

    def parameters(self, cut: int) -> set[str]:
        """Names of the parameters that are read behind a cut, up to the next cut and the site in between."""
        targets = list(self.crossing[cut + 1]) if cut + 1 < len(self.crossing) else []
        if 0 < cut <= len(self.sites):
            targets.append(self._names[self.sites[cut - 1].nodes.core])
        return {str(node.target) for node in cone(targets, self.crossing[cut]) if node.op == "get_attr"}

    def nodes(self, cut: int, last: fx.Node) -> list[fx.Node]:
        """What is computed between a cut and the next, or behind the last one up to `last`, without parameters."""
        targets = self.crossing[cut + 1] if cut + 1 < len(self.crossing) else [last]
        inside = cone(targets, self.crossing[cut]) - set(self.crossing[cut])
        return [node for node in self._nodes if node in inside and node.op != "get_attr"]

    def working_bytes(self, cut: int, batch: int, length: int) -> int:
        """The most bytes of activations alive at once while a block runs on one batch."""
        targets = self.crossing[cut + 1] if cut + 1 < len(self.crossing) else []
        if not targets:
            targets = [self._names[self.sites[cut - 1].nodes.core]]
        inside = cone(targets, self.crossing[cut])
        nodes = [node for node in self._nodes if node in inside and node.op != "get_attr"]
        uses = Counter(arg for node in nodes for arg in node.all_input_nodes) + Counter(targets)
        live, most = 0, 0
        for node in nodes:
            live += self._bytes(node, batch, length)
            most = max(most, live)
            for arg in set(node.all_input_nodes):
                uses[arg] -= sum(one is arg for one in node.all_input_nodes)
                if uses[arg] <= 0 and arg.op != "get_attr":
                    live -= self._bytes(arg, batch, length)
        return most

    def _choose(self) -> list[int]:
        """The position of the last node before each cut; positions never decrease."""
        places: list[int] = []
        behind = -1
        for site in self.sites:
            wanted = (site.nodes.query, site.nodes.key, site.nodes.value)
            before = min(self._order[self._names[name]] for name in wanted) - 1
            first = max([behind, *places[-1:], 0])
            places.append(self._narrowest(range(first, before + 1)) if before > first else first)
            behind = self._order[self._names[site.nodes.core]]
        return places

    def _narrowest(self, candidates: range) -> int:
        """The last of the positions at which the fewest bytes cross."""
        first = candidates[0]
        live = {node for node in self._last if self._order[node] <= first < self._last[node]}
        ending: dict[int, list[fx.Node]] = {}
        for node, last in self._last.items():
            ending.setdefault(last, []).append(node)
        best, fewest = first, self._sum(live) if live else float("inf")
        for position in candidates[1:]:
            live.difference_update(ending.get(position, ()))
            node = self._nodes[position]
            if self._last.get(node, -1) > position:
                live.add(node)
            found = self._sum(live)
            if found <= fewest and live:
                best, fewest = position, found
        return best

    def _crossing(self, place: int) -> list[fx.Node]:
        return [
            node for node, last in self._last.items()
            if self._order[node] <= place < last and isinstance(node.meta.get("val"), Tensor)
        ]  # fmt: skip

    def _sum(self, nodes: Iterable[fx.Node]) -> float:
        """Infinite where something crosses that is no tensor: it could not be kept."""
        found = [isinstance(node.meta.get("val"), Tensor) for node in nodes]
        return sum(self._bytes(node, BATCH, LENGTH) for node in nodes) if all(found) else float("inf")

    def _bytes(self, node: fx.Node, batch: int, length: int) -> int:
        value = node.meta.get("val")
        return bytes_of(value.dtype, shape_at(self.program, node, batch, length)) if isinstance(value, Tensor) else 0


def shape_at(program: Program, node: fx.Node, batch: int, length: int) -> tuple[int, ...]:
    """The node's shape for `batch` rows of `length` tokens; dims made of something else count as the length."""
    tokens = next(item for item in program.placeholders() if item.target == TOKENS)
    sizes = dict(zip(map(str, shape_of(tokens)), (batch, length), strict=True))
    try:
        return concrete_shape(node, sizes)
    except ValueError:
        return tuple(size if isinstance(size, int) else length for size in shape_of(node))


def parameter_bytes(program: Program, names: Iterable[str]) -> int:
    """Of the parameters of those names, each tensor once."""
    if program.weights is not None:
        return program.weights.bytes_of(names)
    own = {**dict(program.module.named_parameters()), **dict(program.module.named_buffers())}
    return sum(tensor.numel() * tensor.element_size() for name, tensor in own.items() if name in set(names))


def all_parameters(program: Program) -> list[str]:
    return [str(node.target) for node in program.graph.nodes if node.op == "get_attr"]


def is_finite(tensor: Tensor) -> bool:
    """Without a mask in memory: a sum is not finite where an entry is not."""
    return bool(torch.isfinite(tensor.detach().sum(dtype=torch.float64)))
