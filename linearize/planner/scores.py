"""What every candidate costs in loss at every site, measured in one walk of the teacher's stream and kept on disk.

For a candidate at a site, the others being the teacher's (a learning mixer is prepared first, by searches and closed
forms, without gradients):

    loss     mean KL(teacher || teacher with the candidate there), nats a token: run from the site on
    error    relative MSE of its output
    fisher   the same loss to second order, from sampled gradients at the site's output, without a run
    heads    the same of each kv head alone
    effects  a sketch of what each kv head's error does to the log-likelihood of sampled text, of which inner products
             say how errors of heads, of this candidate and of others, add up (`sensitivity`)

Draws and the sketch's signs are the same for every candidate, so those measured later go with those measured before.
Memory is that of the stream plus one site's gradients, `SAMPLES` times its output. The cache holds one JSON file per
model, data and site, `WIDTH` numbers a head and candidate, written after every candidate: an interrupted run goes on,
and a new candidate is measured alone.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.calibration.closed_form import fit_linear
from linearize.calibration.keys import hash_of, model_key
from linearize.calibration.scores import cache_folder
from linearize.calibration.teacher import TeacherStream
from linearize.errors import ArtifactError, RecipeError
from linearize.files import write_atomically
from linearize.mixers import Mixer, build_mixer
from linearize.planner.candidates import Candidate
from linearize.planner.sensitivity import effects, gradients, second_order, sketch
from linearize.planner.student import divergence
from linearize.program import Program
from linearize.progress import Progress
from linearize.spec import Site

SAMPLES = 8
PREPARED_ON = 512  # tokens of a row: preparing is quadratic in the length for some mixers
WIDTH = 128  # of a sketch
KEPT = 2**28  # bytes of the teacher's logits that stay in memory while one site is scored
VERSION = 2


@dataclass(frozen=True)
class Scored:
    """One candidate at one site; `heads` [G], `effects` [G, WIDTH], whose half squared lengths are near `heads`."""

    loss: float
    error: float
    fisher: float
    heads: list[float]
    effects: list[list[float]]


Table = dict[int, dict[str, Scored]]  # site -> Candidate.measured_as -> what was measured


@dataclass(frozen=True)
class Scores:
    """All that a plan is predicted from. `tokens` were measured on; `second_order`: losses are the estimate of it."""

    table: Table
    tokens: int
    second_order: bool = False


def planner_scores(
    teacher: Program,
    data: Callable[[], Sequence[Tensor]],
    data_key: str,
    candidates: Mapping[int, Sequence[Candidate]],
    progress: Progress,
    seed: int = 0,
    walk: Path | None = None,
) -> Scores:
    """`candidates` by site; `data` gives batches int64 [B, T] and is asked only for what the cache does not know. Of a
    model that stays on disk losses are taken to second order (`streamed`), and `walk` keeps what the walk needs.

    Raises:
        RecipeError: the model has no weights.
    """
    if teacher.valueless:
        raise RecipeError("a plan needs scores, and scores need weights: this model has none")
    model = model_key(teacher)
    files = {
        site.index: cache_folder("planner") / f"{hash_of(model, data_key, f'site {site.index} seed {seed}')}.json"
        for site in teacher.matched
    }
    known = {site: _read(file) for site, file in files.items()}
    missing = {
        site: [one for one in wanted if one.measured_as not in known[site].table.get(site, {})]
        for site, wanted in candidates.items()
    }
    tokens = max((one.tokens for one in known.values()), default=0)
    if any(missing.values()):
        batches = data()
        tokens = sum(batch.numel() for batch in batches)

        def keep(site: Site, one: Candidate, found: Scored) -> None:
            rows = known[site.index].table.setdefault(site.index, {})
            rows[one.measured_as] = found
            _write(files[site.index], rows, site.index, tokens)

        if teacher.weights is None:
            _measure(teacher, batches, missing, keep, progress, seed)
        else:
            from linearize.planner.streamed import score_streamed

            score_streamed(teacher, batches, missing, keep, walk, progress, seed)
    table = {site: one.table.get(site, {}) for site, one in known.items()}
    return Scores(table, tokens, second_order=teacher.weights is not None)


def _measure(
    teacher: Program,
    batches: Sequence[Tensor],
    missing: Mapping[int, Sequence[Candidate]],
    keep: Callable[[Site, Candidate, Scored], None],
    progress: Progress,
    seed: int,
) -> None:
    stream = TeacherStream(teacher, list(batches))
    with torch.no_grad():
        for site in progress.track(stream.walk(teacher.matched), "scoring sites", total=len(teacher.matched)):
            wanted = missing.get(site.index, ())
            if not wanted:
                continue
            bench = SiteBench(stream, site, seed)
            for one in wanted:
                keep(site, one, bench.score(one))
                progress.note(f"site {site.index} {one.mixer}")


class SiteBench:
    """One site while the stream stands before it: gradients made once, then any number of candidates."""

    def __init__(self, stream: TeacherStream, site: Site, seed: int) -> None:
        self.stream, self.site = stream, site
        self.batches = range(len(stream.batches))
        self.gradients = [gradients(stream, site, batch, SAMPLES, seed) for batch in self.batches]
        self._teacher: dict[int, Tensor] = {}

    def score(self, one: Candidate) -> Scored:
        mixer = prepared(self.stream, self.site, one.mixer, dict(one.scored))
        sums = torch.zeros(4, dtype=torch.float64)  # loss, squared error, outputs, squared outputs
        heads = self.site.attention.kv_heads
        fisher, tokens, numbers = 0.0, 0, 0
        alone, kept = torch.zeros(heads).double(), torch.zeros(heads, WIDTH).double()
        for batch in self.batches:
            inputs, output = self.stream.site_values(self.site, mixer.needs, batch)
            replaced = mixer.run(inputs)
            error, y = replaced.double() - output.double(), output.double()
            effect = effects(self.gradients[batch], error, heads).cpu()
            whole, parts = second_order(effect)
            fisher, alone, kept = fisher + whole.item(), alone + parts, kept + sketch(effect, WIDTH, batch)
            loss = 0.0 if one.mixer == "keep" else self._loss(batch, replaced)
            sums += torch.tensor([loss, error.square().sum(), y.sum(), y.square().sum()], dtype=torch.float64)
            tokens, numbers = tokens + y.shape[0] * y.shape[2], numbers + y.numel()
        loss, squares, mean, power = (sums / torch.tensor([tokens, numbers, numbers, numbers])).tolist()
        variance = max(power - mean**2, 1e-30)
        return Scored(max(loss, 0.0), squares / variance, fisher / tokens, (alone / tokens).tolist(),
                      rounded(kept / tokens**0.5))  # fmt: skip

    def _loss(self, batch: int, replaced: Tensor) -> float:
        return divergence(self._logits(batch), self.stream.logits(batch, {self.site.nodes.core: replaced}))


    def _logits(self, batch: int) -> Tensor:
        """The teacher's [B, T, V]; kept where those of all batches are few."""
        if batch in self._teacher:
            return self._teacher[batch]
        logits = self.stream.logits(batch)
        if len(self.batches) * logits.numel() * logits.element_size() <= KEPT:
            self._teacher[batch] = logits
        return logits


def rounded(effect: Tensor) -> list[list[float]]:
    """To what a file needs."""
    return [[float(f"{value:.6g}") for value in head] for head in effect.tolist()]


def prepared(stream: TeacherStream, site: Site, mixer: str, options: dict[str, Any]) -> Mixer:
    """A mixer with what is found without gradients: searches on the first `PREPARED_ON` tokens of the first batch's
    rows, then its linear part in closed form on all batches, as `compile` does."""
    made = build_mixer(mixer, site.attention, options).to(stream.program.place)
    if made.fits:
        inputs, target = stream.site_values(site, made.needs, 0)
        made.prepare([value[..., :PREPARED_ON, :] for value in inputs], target[..., :PREPARED_ON, :])
        if any(isinstance(part, Mixer) and part.linear_part() is not None for part in made.modules()):
            fit_linear(made, stream, site)
    return made


def _read(file: Path) -> Scores:
    """Nothing where there is no such file, or none that can be used."""
    try:
        data = json.loads(file.read_text())
        if data["version"] != VERSION:
            return Scores({}, 0)
        rows = {name: Scored(**row) for name, row in data["candidates"].items()}
        return Scores({int(data["site"]): rows}, int(data["tokens"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return Scores({}, 0)


def _write(file: Path, rows: dict[str, Scored], site: int, tokens: int) -> None:
    """A cache that cannot be written costs time, nothing else."""
    with contextlib.suppress(OSError, ArtifactError):
        file.parent.mkdir(parents=True, exist_ok=True)
        made = {name: vars(row) for name, row in rows.items()}
        data = {"version": VERSION, "site": site, "tokens": tokens, "candidates": made}
        write_atomically(file, json.dumps(data).encode())
