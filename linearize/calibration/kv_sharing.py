"""Which layers share whose cache: the search of KVSharer (Yang et al. 2024, arXiv 2410.18517, algorithm 1).

1. Keys and values of every layer, averaged over the calibration rows, [G,T,d]; the distance of two layers is the mean
   over heads and positions of the Euclidean distance, of keys and values alike.
2. The pairs, the most distant first (the paper's finding: unlike caches are the better ones to share). Of each, the
   later layer is to read the earlier one's cache; layers that read its own until now go on to read that one's.
3. A pair is kept where the final hidden states (before the output projection) of the model with all sharing so far have
   a mean cosine with the source's above a threshold, a row of the batch flattened to one vector.
4. Until the wanted number of layers share.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, fx

from linearize.calibration.teacher import TeacherStream
from linearize.mixers.share import sharing_problem
from linearize.passes.rewrite import ShareKeys
from linearize.program import Program
from linearize.progress import Progress
from linearize.rewriting.walk import is_op, shape_of, walk_back

aten = torch.ops.aten
PRODUCTS = (aten.linear, aten.addmm, aten.matmul, aten.mm)


class Source(NamedTuple):
    """The site whose cache is read, and why."""

    of: int
    reason: str


def choose_sharing(
    teacher: Program, batches: list[Tensor], kept: Sequence[int], share: float, threshold: float, progress: Progress
) -> dict[int, Source]:
    """{site: whose cache it reads} for `share` of the sites in `kept`, or fewer where the threshold allows no more."""
    wanted, sources = round(share * len(kept)), dict[int, int]()
    distances = cache_distances(TeacherStream(teacher, batches), kept)
    before = final_hidden(teacher, batches)
    cosine = 1.0
    for later, earlier in progress.track(ranked(distances), "sharing caches", total=len(distances)):
        if len(sources) >= wanted:
            break
        trial = rerouted(sources, later, earlier)
        if later in sources or not _allowed(teacher, trial):
            continue
        found = similarity(before, final_hidden(ShareKeys(trial).run(teacher), batches))
        if found > threshold:
            sources, cosine = trial, found
    reason = f"kvsharer: {len(sources)} sites share, final hidden states at a cosine of {cosine:.3f}"
    return {site: Source(of, reason) for site, of in sources.items()}


def cache_distances(stream: TeacherStream, kept: Sequence[int]) -> dict[tuple[int, int], float]:
    """{(later site, earlier site): distance} of step 1; sites of other sizes have none."""
    caches: dict[int, list[Tensor]] = {}
    for site in stream.walk(stream.program.matched):
        if site.index in kept:
            caches[site.index] = _average(stream, [site.nodes.key, site.nodes.value])
    pairs = [(later, earlier) for later in caches for earlier in caches if earlier < later]
    return {
        (later, earlier): sum(
            (a - b).norm(dim=-1).mean().item() for a, b in zip(caches[later], caches[earlier], strict=True)
        ) / 2
        for later, earlier in pairs
        if all(a.shape == b.shape for a, b in zip(caches[later], caches[earlier], strict=True))
    }  # fmt: skip


def _average(stream: TeacherStream, names: list[str]) -> list[Tensor]:
    """Over all rows, at the length of the shortest batch."""
    length = min(batch.shape[1] for batch in stream.batches)
    rows = sum(batch.shape[0] for batch in stream.batches)
    totals: list[Tensor] = []
    for batch in range(len(stream.batches)):
        sums = [x[:, :, :length].float().sum(0) for x in stream.values(names, batch)]
        totals = [a + b for a, b in zip(totals, sums, strict=True)] if totals else sums
    return [total / rows for total in totals]


def ranked(distances: Mapping[tuple[int, int], float]) -> list[tuple[int, int]]:
    """The pairs of step 2."""
    return sorted(distances, key=lambda pair: (-distances[pair], pair))


def rerouted(sources: Mapping[int, int], later: int, earlier: int) -> dict[int, int]:
    """`sources` with `later` reading what `earlier` reads, and those that read `later` with it."""
    target = sources.get(earlier, earlier)
    return {site: target if of == later else of for site, of in {**sources, later: target}.items()}


def _allowed(teacher: Program, sources: Mapping[int, int]) -> bool:
    sites = {site.index: site for site in teacher.matched}
    return all(sharing_problem(sites[site], sites[of], "keep") is None for site, of in sources.items())


def final_hidden(program: Program, batches: list[Tensor]) -> list[Tensor]:
    """[B, T, D] of each batch, before the output projection; the logits where that is not found."""
    node = _before_head(program)
    return [TeacherStream(program, [batch]).values([node.name], 0)[0].float() for batch in batches]


def _before_head(program: Program) -> fx.Node:
    output = next(node for node in program.graph.nodes if node.op == "output")
    logits = output.args[0][0] if isinstance(output.args[0], list | tuple) else output.args[0]
    head = walk_back(logits, lambda node: not is_op(node, *PRODUCTS))
    if not is_op(head, *PRODUCTS):
        return logits
    hidden = head.args[1] if is_op(head, aten.addmm) else head.args[0]
    return hidden if isinstance(hidden, fx.Node) and len(shape_of(hidden)) == 3 else logits


def similarity(before: Sequence[Tensor], after: Sequence[Tensor]) -> float:
    """Mean cosine over all rows, each flattened to one vector."""
    cosines = [
        torch.nn.functional.cosine_similarity(a.flatten(1), b.flatten(1)) for a, b in zip(before, after, strict=True)
    ]
    return torch.cat(cosines).mean().item()
