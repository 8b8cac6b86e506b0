"""A prompt and what the file made of it when it was written, kept in the manifest; `linearize verify` repeats it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from linearize.errors import ArtifactError
from linearize.export.manifest import Manifest, Probe, read_manifest
from linearize.export.names import LOGITS
from linearize.export.runner import OnnxModel
from linearize.export.weights import sha256

PROMPT, STEPS, SHOWN = 40, 24, 8
PIECES = (1, 7, 32)
TOLERANCE, QUANTISED_TOLERANCE = 1e-3, 5e-2  # relative; 8-bit products are rounded differently by each CPU


@dataclass(frozen=True)
class Found:
    """What a check of a directory found."""

    tokens_equal: int
    tokens: int
    logit_difference: float
    piece_difference: float
    tolerance: float


def take_probe(folder: Path) -> Probe:
    """Run the file on a fixed random prompt, then greedily."""
    runner = OnnxModel(folder, threads=1)
    manifest = runner.manifest
    longest = manifest.get("max_positions") or 1 << 30
    prompt, steps = min(PROMPT, longest // 2), min(STEPS, longest // 2)
    ids = np.random.default_rng(0).integers(manifest["vocab_size"] or 2, size=(1, prompt))
    logits, _ = runner.step(ids)
    tokens = runner.generate(ids, steps)[0, prompt:]
    return Probe(
        prompt=ids[0].tolist(), tokens=tokens.tolist(), logits=[float(x) for x in logits[0, -1, :SHOWN]],
        largest=float(np.abs(logits).max()),
    )  # fmt: skip


def check_directory(directory: str | Path) -> Found:
    """Whether an exported directory is what was written, and computes here what it computed there. Needs no PyTorch.

    Raises:
        ArtifactError: a file is missing or was changed, the manifest does not fit the graph, or results differ.
    """
    folder = Path(directory)
    manifest = read_manifest(folder)
    for file, expected in ((manifest.weights.file, manifest.weights.sha256), (manifest.graph, manifest.graph_sha256)):
        _check_hash(folder / file, expected)
    for name in manifest.tokenizer_files:
        if not (folder / name).is_file():
            raise ArtifactError(f"{folder} lacks {name}, which its manifest lists")
    runner = OnnxModel(folder, threads=1)
    check_signature(manifest, runner.session, folder)
    if manifest.verified is None or manifest.probe is None:
        raise ArtifactError(f"{folder} was never verified when it was written; export it again")
    return _repeat(manifest.probe, runner, manifest)


def _check_hash(path: Path, expected: str) -> None:
    try:
        found = sha256(path)
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error
    if found != expected:
        raise ArtifactError(
            f"{path} is not what was exported: sha256 {found[:12]}..., not {expected[:12]}... as its manifest says; "
            "export again, or copy the directory again"
        )


def check_signature(manifest: Manifest, session: Any, folder: Path) -> None:
    """Names and shapes of the manifest are the graph's.

    Raises:
        ArtifactError: naming the first that differs.
    """
    listed = [(entry.name, entry.shape) for entry in manifest.inputs]
    listed += [(entry.input, entry.shape) for entry in manifest.states]
    real = [(value.name, list(value.shape)) for value in session.get_inputs()]
    outputs = [LOGITS, *(entry.output for entry in manifest.states)]
    names = [value.name for value in session.get_outputs()]
    pairs = [*zip(listed, real, strict=False), *zip(outputs, names, strict=False)]
    for mine, theirs in pairs:
        if mine != theirs:
            raise ArtifactError(f"{folder}: the manifest says {_show(mine)} where the graph has {_show(theirs)}")
    if len(listed) != len(real) or len(outputs) != len(names):
        raise ArtifactError(f"{folder}: the manifest lists {len(listed)} inputs, the graph has {len(real)}")


def _show(value: Any) -> str:
    return json.dumps(value)


def _repeat(probe: Probe, runner: OnnxModel, manifest: Manifest) -> Found:
    tolerance = TOLERANCE if manifest.quantization is None else QUANTISED_TOLERANCE
    ids = np.array([probe.prompt])
    whole, _ = runner.step(ids)
    state, start, parts = None, 0, []
    for piece in (*PIECES, ids.shape[1]):
        if start < ids.shape[1]:
            logits, state = runner.step(ids[:, start : start + piece], state)
            parts.append(logits)
            start += piece
    scale = max(1.0, probe.largest)
    difference = float(np.abs(whole[0, -1, : len(probe.logits)] - np.array(probe.logits)).max()) / scale
    by_piece = float(np.abs(np.concatenate(parts, axis=1) - whole).max()) / scale
    tokens = runner.generate(ids, len(probe.tokens))[0, ids.shape[1] :].tolist()
    equal = sum(a == b for a, b in zip(tokens, probe.tokens, strict=True))
    if not max(difference, by_piece) <= tolerance:
        raise ArtifactError(
            f"{runner.directory} computes something else here: logits differ by {difference:.3g} from those recorded, "
            f"by {by_piece:.3g} between pieces (relative; {tolerance:g} is allowed), "
            f"{equal} of {len(tokens)} tokens equal"
        )
    return Found(equal, len(tokens), difference, by_piece, tolerance)
