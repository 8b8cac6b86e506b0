"""Scores of a model that stays on disk: one walk forward, one walk back, a block of weights in memory at a time.

A candidate's KL at the logits would run the rest of the model for every candidate, which here would read it. Instead
its loss is taken to second order (`sensitivity`), from gradients that go back through the model once for all sites:

    forward    what crosses every cut is kept, in memory or in shards on disk (`calibration.spill`)
    back       block by block from the last: with G_s the gradient of sum_t log p_t(x_t) of draw s by what crosses the
               next cut, the block is run again and gives the gradient by its site's output, g_s, and by what crosses
               its own cut. The draws are those of `sensitivity.gradients`, and so are the gradients.
    at a site  every candidate's error meets g_s

Memory is a block, what its run keeps for the way back, and of one site `SAMPLES` times its output; it does not grow
with the layers. On disk are all cuts, and two of gradients, `SAMPLES` times as wide. Each candidate is remembered when
it is scored; with a folder, a run that was interrupted goes on from the cuts that it finds there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, fx

from linearize.calibration.spill import COMPLETE, Spill
from linearize.calibration.teacher import TeacherStream
from linearize.planner.candidates import Candidate
from linearize.planner.scores import SAMPLES, Scored, SiteBench
from linearize.planner.sensitivity import drawn_likelihood
from linearize.program import Program
from linearize.progress import Progress
from linearize.rewriting.walk import evaluate_differentiably
from linearize.spec import Site

Keep = Callable[[Site, Candidate, Scored], None]


class KeptSpill(Spill):
    """Holds on to every cut that is complete: the walk back needs them all."""

    def drop(self, cut: int) -> None:
        if self.folder is not None and not (self._at(cut) / COMPLETE).is_file():
            super().drop(cut)


class StreamedBench(SiteBench):
    """A site whose gradients are known; the loss is the one to second order."""

    def __init__(self, stream: TeacherStream, site: Site, gradients: list[Tensor]) -> None:
        self.stream, self.site, self.gradients = stream, site, gradients
        self.batches = range(len(stream.batches))

    def score(self, one: Candidate) -> Scored:
        found = super().score(one)
        return replace(found, loss=found.fisher)

    def _loss(self, batch: int, replaced: Tensor) -> float:
        return 0.0


@torch.no_grad()
def score_streamed(
    teacher: Program,
    batches: Sequence[Tensor],
    missing: Mapping[int, Sequence[Candidate]],
    keep: Keep,
    folder: Path | None,
    progress: Progress,
    seed: int,
) -> None:
    """Score the `missing` candidates of a raised program by site, the last site first, and give each to `keep`."""
    stream = TeacherStream(teacher, batches, KeptSpill(folder, "plan"))
    back = WayBack(stream, Spill(folder, "back"), seed)
    todo = [site for site in reversed(teacher.matched) if missing.get(site.index)]
    sites = [site for site in reversed(teacher.matched) if todo and back.first(todo[0]) >= site.index >= todo[-1].index]
    for site in progress.track(stream.walk(tuple(sites)), "scoring sites, last first", total=len(sites)):
        bench = StreamedBench(stream, site, back.through(site))
        for one in missing.get(site.index, ()):
            keep(site, one, bench.score(one))
            progress.note(f"site {site.index} {one.mixer}")
        back.leave(site)


class WayBack:
    """The gradients of sampled log-likelihoods on their way from the logits to the first block."""

    def __init__(self, stream: TeacherStream, spill: Spill, seed: int) -> None:
        self.stream, self.spill, self.seed = stream, spill, seed
        self.blocks, self.program = stream.blocks, stream.program
        output = next(node for node in self.program.graph.nodes if node.op == "output")
        self.logits: fx.Node = output.args[0]  # type: ignore[assignment]

    def first(self, site: Site) -> int:
        """The site to start from so that `site` can be reached: itself, where an earlier run left what is behind it."""
        behind, widths = self.blocks.index(site) + 1, [len(_floating(nodes)) for nodes in self.blocks.crossing]
        known = behind < len(widths) and self.spill.newest(behind, len(self.stream.batches), widths) == behind
        return site.index if known else self.program.matched[-1].index

    def through(self, site: Site) -> list[Tensor]:
        """g [SAMPLES,B,H,T,dv] by the site's output, of each batch; the stream stands before the site."""
        cut = self.blocks.index(site)
        writer, found = self.spill.writer(cut), []
        for batch in range(len(self.stream.batches)):
            gradient, *before = self._batch(site, cut, batch)
            found.append(gradient)
            writer.add(before)
        writer.close()
        return found

    def leave(self, site: Site) -> None:
        """Its candidates are scored, so what is behind it is not asked for again."""
        self.spill.drop(self.blocks.index(site) + 1)

    def _batch(self, site: Site, cut: int, batch: int) -> list[Tensor]:
        """[samples, ...] by the site's output, and by each floating tensor that crosses its cut."""
        given = self.stream.given(batch)
        leaves = {node: given[node].detach().requires_grad_() for node in _floating(self.blocks.crossing[cut])}
        core = self.program.node(site.nodes.core)
        last = cut + 1 == len(self.blocks.crossing)
        targets = [self.logits] if last else _floating(self.blocks.crossing[cut + 1])
        with torch.enable_grad():
            y, *outputs = evaluate_differentiably(self.program.module, [core, *targets], given | leaves)
            draws = drawn_likelihood(outputs[0], SAMPLES, self.seed, batch) if last else None
        behind = None if last else self.spill.read(cut + 1, batch)
        inputs, samples = [y, *leaves.values()], list[list[Tensor]]()
        for sample in range(SAMPLES):
            ends, weights = ([draws[sample]], None) if draws is not None else _ends(outputs, behind or [], sample)
            found = torch.autograd.grad(ends, inputs, weights, retain_graph=True, allow_unused=True)
            samples.append([x.new_zeros(x.shape) if g is None else g for g, x in zip(found, inputs, strict=True)])
        return [torch.stack(parts).detach() for parts in zip(*samples, strict=True)]


def _ends(outputs: list[Tensor], behind: list[Tensor], sample: int) -> tuple[list[Tensor], list[Tensor]]:
    """What of a block's results depends on what it was given, with the gradients by it."""
    pairs = [(one, gradient[sample]) for one, gradient in zip(outputs, behind, strict=True) if one.requires_grad]
    return [one for one, _ in pairs], [gradient for _, gradient in pairs]


def _floating(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    return [node for node in nodes if node.meta["val"].is_floating_point()]
