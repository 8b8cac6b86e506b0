"""What each site is worth: numbers by which a recipe chooses layers, streamed over data and cached on disk.

similarity   S_l = mean over tokens of cos(x, x + Attn(norm x)), x the residual stream        (LLM-Drop, He et al. 2024)
error        relative MSE of the output of a candidate mixer, prepared on the first batch but not fitted
loss         mean KL(teacher || teacher with that candidate at this one site) in nats a token

The cache holds one JSON file per model, data and score; delete the folder to measure again. It is LINEARIZE_CACHE or
XDG_CACHE_HOME/linearize, else ~/.cache/linearize.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, fx

from linearize.calibration.fit import output_error
from linearize.calibration.keys import hash_of, model_key
from linearize.calibration.teacher import TeacherStream
from linearize.errors import ArtifactError, RecipeError
from linearize.files import write_atomically
from linearize.mixers import Mixer, build_mixer, mixer_class
from linearize.program import Program
from linearize.progress import Progress
from linearize.recipe import Score
from linearize.rewriting.walk import cone, descendants, is_op, shape_of
from linearize.spec import Site

aten = torch.ops.aten


def site_scores(
    teacher: Program, data: Callable[[], list[Tensor]], data_key: str, wanted: Sequence[Score], progress: Progress
) -> dict[str, dict[int, float]]:
    """{score's name: {site: value}} on a raised program, over the batches int64 [B, T] that `data` gives; it is asked
    only for what the cache does not know under `data_key`. A site that a candidate refuses has no value.

    Raises:
        RecipeError: the model has no weights, or no residual stream was found around a site.
    """
    if teacher.valueless:
        raise RecipeError(f"{wanted[0].name} cannot be measured: the model has no weights; list the layers instead")
    model = model_key(teacher)
    files = {score.name: cache_folder() / f"{hash_of(model, data_key, score.name)}.json" for score in wanted}
    found = {name: values for name, file in files.items() if (values := _read(file)) is not None}
    missing = [score for score in wanted if score.name not in found]
    for name, values in (_measure(teacher, data(), missing, progress) if missing else {}).items():
        found[name] = values
        _write(files[name], name, values)
    return found


def _measure(
    teacher: Program, batches: list[Tensor], wanted: list[Score], progress: Progress
) -> dict[str, dict[int, float]]:
    values: dict[str, dict[int, float]] = {score.name: {} for score in wanted}
    stream = TeacherStream(teacher, batches)
    with torch.no_grad():
        for site in progress.track(stream.walk(teacher.matched), "scoring sites", total=len(teacher.matched)):
            for score in wanted:
                value = _score(stream, site, score)
                if value is not None:
                    values[score.name][site.index] = value
    return values


def _score(stream: TeacherStream, site: Site, score: Score) -> float | None:
    if score.kind == "similarity":
        return similarity(stream, site)
    options = dict(score.options)
    if mixer_class(score.mixer).refusal_with(site, options) is not None:
        return None
    mixer = build_mixer(score.mixer, site.attention, options).to(stream.program.place)
    if mixer.fits:
        mixer.prepare(*stream.site_values(site, mixer.needs, 0))
    return output_error(mixer, stream, site) if score.kind == "error" else replaced_loss(stream, site, mixer)


def similarity(stream: TeacherStream, site: Site) -> float:
    """S_l of the module docstring, sums in float64."""
    names = [node.name for node in residual_nodes(stream.program, site)]
    total, count = 0.0, 0
    for batch in range(len(stream.batches)):
        x, added = stream.values(names, batch)
        cosines = torch.nn.functional.cosine_similarity(x.float(), (x + added).float(), dim=-1)
        total, count = total + cosines.double().sum().item(), count + cosines.numel()
    return total / count


def replaced_loss(stream: TeacherStream, site: Site, mixer: Mixer) -> float:
    """Mean KL(teacher || teacher with `mixer` at this site), in nats a token."""
    total, count = 0.0, 0
    for batch in range(len(stream.batches)):
        inputs, _ = stream.site_values(site, mixer.needs, batch)
        teacher = torch.log_softmax(stream.logits(batch).float(), dim=-1)
        student = torch.log_softmax(stream.logits(batch, {site.nodes.core: mixer.run(inputs)}).float(), dim=-1)
        total += (teacher.exp() * (teacher - student)).double().sum().item()
        count += teacher.shape[0] * teacher.shape[1]
    return total / count


def residual_nodes(program: Program, site: Site) -> tuple[fx.Node, fx.Node]:
    """(x, what the attention adds to it): the operands around the first sum behind the attention, output projection and
    any norm behind it included. In a parallel block (x + attention + MLP) the first sum is not with x; x is then the
    first summand on the way that the attention itself depends on.

    Raises:
        RecipeError: no such sum was found.
    """
    core = program.node(site.nodes.core)
    later, earlier = descendants(program.graph, [core]), cone([core])
    added: fx.Node | None = None
    for node in program.graph.nodes:
        if node not in later or not is_op(node, aten.add, aten.sub):
            continue
        ours = [arg for arg in node.args[:2] if arg in later]
        others = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and arg not in later]
        if len(ours) != 1 or len(others) != 1 or len(shape_of(others[0])) != 3:
            continue
        added = added or ours[0]  # type: ignore[assignment]
        if others[0] in earlier and added is not None:
            return others[0], added
    raise RecipeError(f"site {site.index} ({site.module}): no residual stream around it, so it has no similarity")


def cache_folder(name: str = "scores") -> Path:
    """Where measured things are kept: a folder of that name below LINEARIZE_CACHE, or in the user's cache."""
    given = os.environ.get("LINEARIZE_CACHE")
    if given:
        return Path(given) / name
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "linearize" / name


def _read(file: Path) -> dict[int, float] | None:
    """None where there is no such file, or none that can be used."""
    try:
        return {int(site): float(value) for site, value in json.loads(file.read_text())["sites"].items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _write(file: Path, name: str, values: dict[int, float]) -> None:
    """A cache that cannot be written costs time, nothing else."""
    with contextlib.suppress(OSError, ArtifactError):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, json.dumps({"score": name, "sites": values}, indent=1).encode())
