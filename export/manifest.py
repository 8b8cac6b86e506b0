"""`linearize.json` of an exported directory: what a runtime must know, and what was checked when it was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from linearize.errors import ArtifactError
from linearize.export.names import FLAVOUR, GRAPH_FILE, LOGITS, MANIFEST_FILE, OPSET, PAST, PREFILL_PIECE, PRESENT
from linearize.export.names import WEIGHTS_FILE as WEIGHTS

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel

FORMAT = 1
MINIMUM_ONNXRUNTIME = "1.23"


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(_Strict):
    """An input or output of the graph; dims are sizes or the names batch, length, past."""

    name: str
    shape: list[int | str]
    dtype: str


class StateEntry(_Strict):
    """A state tensor: output `out` of one call is input `in` of the next. `grows` is the axis that lengthens by T."""

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    input: str = Field(alias="in")
    output: str = Field(alias="out")
    shape: list[int | str]
    dtype: str
    init: Literal["zeros"] = "zeros"
    grows: int | None = None


class WeightsEntry(_Strict):
    file: str
    sha256: str
    bytes: int


class Verified(_Strict):
    """The self-check against PyTorch: shapes are [B, T] fed from a random state, `padded` from an empty one."""

    largest_logit_difference: float
    largest_state_difference: float
    tolerance: float
    shapes: list[list[int]]
    padded_shapes: list[list[int]]
    prefill_tokens: int
    greedy_tokens_compared: int
    greedy_tokens_equal: int
    onnxruntime: str
    torch: str


class Manifest(_Strict):
    """The contents of linearize.json."""

    format: int = FORMAT
    kind: Literal["linearized-onnx"] = "linearized-onnx"
    graph: str = GRAPH_FILE
    opset: int = OPSET
    domains: dict[str, int]
    minimum_onnxruntime: str = MINIMUM_ONNXRUNTIME
    flavour: str = FLAVOUR
    model_name: str
    vocab_size: int | None
    max_positions: int | None
    bos_token_id: int | None
    eos_token_ids: list[int]
    prefill_piece: int = PREFILL_PIECE
    inputs: list[Tensor]
    outputs: list[Tensor]
    states: list[StateEntry]
    weights: WeightsEntry
    tokenizer_files: list[str]
    plan: dict[str, Any]
    verified: Verified | None = None


def describe(compiled: LinearizedModel, folder: Path) -> Manifest:
    """The manifest of the graph and the weights that lie in `folder`, not yet verified."""
    from linearize.export.onnx import grows_axis
    from linearize.export.weights import sha256

    program = compiled.program
    config = compiled.config or {}
    states = [
        StateEntry.model_validate(
            {
                "in": f"{PAST}{spec.name}",
                "out": f"{PRESENT}{spec.name}",
                "shape": _shape(spec.shape, spec.batched, spec.grows),
                "dtype": _short(spec.dtype),
                "grows": grows_axis(spec),
            }
        )
        for spec in compiled.state_specs
    ]
    names = [name for name in program.input_names() if name not in program.state_names]
    weights = folder / WEIGHTS
    return Manifest(
        domains={"": OPSET},
        model_name=program.model_name,
        vocab_size=program.vocab_size,
        max_positions=program.max_positions,
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_as_list(config.get("eos_token_id")),
        inputs=[Tensor(name=name, shape=["batch", "length"], dtype="int64") for name in names],
        outputs=[Tensor(name=LOGITS, shape=["batch", "length", program.vocab_size or "vocabulary"], dtype="float32")],
        states=states,
        weights=WeightsEntry(file=WEIGHTS, sha256=sha256(weights), bytes=weights.stat().st_size),
        tokenizer_files=sorted(compiled.files),
        plan=compiled.plan.model_dump(mode="json"),
    )


def _shape(shape: tuple[int, ...], batched: bool, grows: int | None) -> list[int | str]:
    dims: list[int | str] = ["past" if dim == grows else size for dim, size in enumerate(shape)]
    return ["batch", *dims] if batched else dims


def _short(dtype: object) -> str:
    return str(dtype).removeprefix("torch.")


def _as_list(value: int | list[int] | None) -> list[int]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def write_manifest(manifest: Manifest, folder: Path) -> None:
    (folder / MANIFEST_FILE).write_text(manifest.model_dump_json(indent=1, by_alias=True))


def read_manifest(directory: str | Path) -> Manifest:
    """The validated manifest of an exported directory.

    Raises:
        ArtifactError: there is none, it is not JSON, of another format, or a field is missing or wrong.
    """
    path = Path(directory) / MANIFEST_FILE
    try:
        data = json.loads(path.read_bytes())
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}; is this an exported directory?") from error
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged: not JSON ({error})") from error
    kind, version = (data.get("kind"), data.get("format")) if isinstance(data, dict) else (None, None)
    if kind != "linearized-onnx":
        raise ArtifactError(f"{path} is of kind {kind!r}, not an exported model; run `linearize export` on it first")
    if version != FORMAT:
        raise ArtifactError(f"{path} has format {version!r}; this version of linearize reads {FORMAT}")
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise ArtifactError(f"{path}: {where}: {problem['msg']}") from error
