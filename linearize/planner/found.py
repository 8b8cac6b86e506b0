"""Candidates that are found on data, site by site: windows by head, and the layer whose cache a site could read.

    moa     for each mean of `MEANS`: the rules alpha + beta N of its kv heads that lose least output error in all, at
            so many keys a head on average (`calibration.head_windows`). alpha is at most `candidates.LOCAL` keys and
            beta N the same number per token at any length, so a rule is scored on short rows as it stands.
    share   the `SOURCES` earlier sites by whose keys and values its output changes least, and the one whose cache is
            most unlike its own, as KVSharer would have it (`calibration.kv_sharing`); only where it may be read.

One walk of the teacher's stream; what was found is kept beside the scores, one file a site. Of other sites' caches
those of one batch are in memory at a time.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from linearize.calibration.head_windows import profile_heads, solve
from linearize.calibration.keys import hash_of, model_key
from linearize.calibration.scores import cache_folder
from linearize.calibration.spill import Spill
from linearize.calibration.teacher import TeacherStream
from linearize.errors import ArtifactError
from linearize.files import write_atomically
from linearize.mixers import build_mixer
from linearize.mixers.moa import head_windows
from linearize.mixers.share import sharing_problem
from linearize.planner.candidates import LOCAL, Candidate
from linearize.program import Program
from linearize.progress import Progress
from linearize.spec import AttentionSpec, Site

STARTS = (16, 32, 64, LOCAL)
GROWTHS = (0.0, *(2.0**-power for power in range(8, 0, -1)))
RULES = tuple((alpha, beta) for alpha in STARTS for beta in GROWTHS)
MEANS = (1 / 128, 1 / 32, 1 / 8, 1 / 4)  # of the context, on top of `NEAR`
NEAR, SINKS = 32, 4
SOURCES = 2
FOUND = ("moa", "share")
VERSION = 1

Made = list[tuple[str, dict[str, Any]]]


def found_candidates(
    teacher: Program,
    data: Callable[[], Sequence[Tensor]],
    data_key: str,
    kinds: Sequence[str],
    context: int,
    length: int,
    progress: Progress,
    spill: Spill | None = None,
) -> dict[int, list[Candidate]]:
    """Of the kinds `kinds` (of `FOUND`), by site, for a raised program, to be scored on rows of `length` tokens; `data`
    gives batches int64 [B, T] and is asked only for what the cache does not know; `spill` keeps what crosses cuts."""
    model, about = model_key(teacher), f"{context} {sorted(kinds)} {VERSION}"
    sites = [site for site in teacher.matched if site.attention.mask.kind == "causal" and kinds]
    files = {
        site.index: cache_folder("planner") / f"{hash_of(model, data_key, f'found {site.index} {about}')}.json"
        for site in sites
    }
    known = {site: made for site, file in files.items() if (made := _read(file)) is not None}
    if len(known) < len(sites):
        missing = [site for site in sites if site.index not in known]
        known |= _search(teacher, list(data()), missing, kinds, context, files, progress, spill)
    return {site: [_candidate(*one, length) for one in made] for site, made in known.items()}


def _candidate(mixer: str, options: dict[str, Any], length: int) -> Candidate:
    scored = {**options, "context": min(length, options["context"])} if mixer == "moa" else options
    return Candidate(mixer, _frozen(options), _frozen(scored))


def _frozen(options: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted((key, tuple(value) if isinstance(value, list) else value) for key, value in options.items()))


def _search(
    teacher: Program, batches: list[Tensor], sites: Sequence[Site], kinds: Sequence[str], context: int,
    files: Mapping[int, Path], progress: Progress, spill: Spill | None,
) -> dict[int, Made]:  # fmt: skip
    stream, known = TeacherStream(teacher, batches, spill), dict[int, Made]()
    wanted = {site.index for site in sites}
    with torch.no_grad():
        for site in progress.track(stream.walk(teacher.matched), "finding candidates", total=len(teacher.matched)):
            if site.index in wanted:
                made: Made = moa_rules(stream, site, context) if "moa" in kinds else []
                made += [("share", {"of": of}) for of in sources(stream, site)] if "share" in kinds else []
                known[site.index] = made
                _write(files[site.index], made)
    return known


# ---- windows by head -------------------------------------------------------------------------------------------------


def moa_rules(stream: TeacherStream, site: Site, context: int) -> Made:
    """None for a single kv head, which is a window."""
    spec = site.attention
    if spec.kv_heads < 2:
        return []
    values = [stream.site_values(site, (), batch)[0] for batch in range(len(stream.batches))]
    errors = profile_heads(stream, spec, values, SINKS, RULES)
    return [("moa", options) for options in chosen_rules(spec, errors, context)]


def chosen_rules(spec: AttentionSpec, errors: Sequence[Sequence[float]], context: int) -> list[dict[str, Any]]:
    """`errors` [G][rule]: the options of every mean, each once."""
    costs = [head_windows(1, alpha, beta, context)[0] for alpha, beta in RULES]
    steps = {(0, head): list(zip(costs, row, strict=True)) for head, row in enumerate(errors)}
    made = []
    for mean in MEANS:
        places = solve(steps, (NEAR + mean * context) * spec.kv_heads)
        rules = [RULES[places[0, head]] for head in range(spec.kv_heads)]
        options = {"start": [a for a, _ in rules], "growth": [b for _, b in rules], "context": context, "sinks": SINKS}
        if options not in made:
            made.append(options)
    return made


# ---- other layers' caches --------------------------------------------------------------------------------------------


def sources(stream: TeacherStream, site: Site) -> list[int]:
    """Sites whose cache this one could read: those of least error, then the least alike, each once."""
    earlier = [other for other in stream.program.matched if other.index < site.index]
    legal = [other for other in earlier if sharing_problem(site, other, "keep") is None]
    if not legal:
        return []
    errors, distances = dict.fromkeys([o.index for o in legal], 0.0), dict.fromkeys([o.index for o in legal], 0.0)
    names = [name for other in legal for name in (other.nodes.key, other.nodes.value)]
    for batch in range(len(stream.batches)):
        inputs, output = stream.site_values(site, (), batch)
        caches = iter(stream.values(names, batch))
        for other in legal:
            key, value = next(caches), next(caches)
            mixer = build_mixer("share", site.attention, {"of": other.index}).to(output.device)
            sinks = stream.values([str(site.nodes.sinks)], batch) if site.attention.sinks else []
            errors[other.index] += (mixer.run([*inputs, key, value, *sinks]) - output).double().square().sum().item()
            distances[other.index] += sum((a - b).double().norm(dim=-1).mean().item()
                                          for a, b in zip(inputs[1:], (key, value), strict=True))  # fmt: skip
    closest = sorted(errors, key=lambda of: (errors[of], of))[:SOURCES]
    return list(dict.fromkeys([*closest, max(distances, key=lambda of: (distances[of], -of))]))


# ---- what is remembered ----------------------------------------------------------------------------------------------


def _read(file: Path) -> Made | None:
    """None where there is no such file, or none that can be used."""
    try:
        return [(str(mixer), dict(options)) for mixer, options in json.loads(file.read_text())]
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, made: Made) -> None:
    """A cache that cannot be written costs time, nothing else."""
    with contextlib.suppress(OSError, ArtifactError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps(made).encode())
