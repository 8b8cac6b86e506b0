"""`linearize.json` of an exported directory: what a runtime must know, and what was checked when it was written."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from linearize.errors import ArtifactError
from linearize.export.names import CONTRIB, GRAPH_FILE, LOGITS, MANIFEST_FILE, NATIVE, OPSET, PREFILL_PIECE
from linearize.export.names import WEIGHTS_FILE as WEIGHTS

if TYPE_CHECKING:
    from linearize.export.interface import Interface, Port
    from linearize.runtime.model import LinearizedModel

FORMAT = 1
MINIMUM_ONNXRUNTIME = "1.30"  # the oldest that the tests run: onnxruntime-node and -web


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Tensor(_Strict):
    """An input or output of the graph; dims are sizes or the names batch, length, past."""

    name: str
    shape: list[int | str]
    dtype: str


class PartEntry(_Strict):
    """A state of the model within a packed one: numbers `start` .. of a row, as float32."""

    name: str
    start: int
    shape: list[int]
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
    parts: list[PartEntry] | None = None


class LoweringEntry(_Strict):
    """What the operators of one replaced attention became."""

    site: int
    module: str
    mixer: str
    operators: dict[str, str]


class WeightsEntry(_Strict):
    file: str
    sha256: str
    bytes: int


class Probe(_Strict):
    """A prompt, the first logits after it, the largest one of all, and the greedy tokens that follow."""

    prompt: list[int]
    tokens: list[int]
    logits: list[float]
    largest: float


class Quantization(_Strict):
    """What was quantised and what it cost, on tokens drawn from the model itself (`loss.py`)."""

    kind: Literal["int8", "int4", "web"]
    weights: int
    perplexity: float
    perplexity_float32: float
    kl: float
    tokens: int
    bytes: int
    bytes_float32: int


class Verified(_Strict):
    """The self-check against PyTorch, of a quantised file before it was quantised.

    shapes are [B, T] fed from a random state, padded_shapes from an empty one.
    """

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
    minimum_onnxruntime: str
    flavour: Literal["native", "portable"]
    lowerings: list[LoweringEntry]
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
    graph_sha256: str
    tokenizer_files: list[str]
    plan: dict[str, Any]
    verified: Verified | None = None
    quantization: Quantization | None = None
    probe: Probe | None = None


def describe(compiled: LinearizedModel, folder: Path, interface: Interface, flavour: str) -> Manifest:
    """The manifest of the graph and the weights that lie in `folder`, not yet verified."""
    from linearize.export.weights import sha256

    program = compiled.program
    config = compiled.config or {}
    inputs = [Tensor(name=name, shape=list(dims), dtype="int64") for name, dims in interface.token_inputs().items()]
    return Manifest(
        domains={"": OPSET} | ({CONTRIB: 1} if flavour == NATIVE else {}),
        minimum_onnxruntime=MINIMUM_ONNXRUNTIME,
        flavour=flavour,  # type: ignore[arg-type]
        lowerings=lowerings(compiled, flavour),
        model_name=program.model_name,
        vocab_size=program.vocab_size,
        max_positions=program.max_positions,
        bos_token_id=config.get("bos_token_id"),
        eos_token_ids=_as_list(config.get("eos_token_id")),
        inputs=inputs,
        outputs=[Tensor(name=LOGITS, shape=["batch", "length", program.vocab_size or "vocabulary"], dtype="float32")],
        states=[_state_entry(port) for port in interface.ports],
        weights=weights_entry(folder),
        graph_sha256=sha256(folder / GRAPH_FILE),
        tokenizer_files=sorted(compiled.files),
        plan=compiled.plan.model_dump(mode="json"),
    )


def weights_entry(folder: Path) -> WeightsEntry:
    from linearize.export.weights import sha256

    weights = folder / WEIGHTS
    return WeightsEntry(file=WEIGHTS, sha256=sha256(weights), bytes=weights.stat().st_size)


def lowerings(compiled: LinearizedModel, flavour: str) -> list[LoweringEntry]:
    """Read off the lowered graph: the operators of every mixer, and what each was written as."""
    from linearize.export.native import FAR_FIELD, lowering_of

    found: dict[str, dict[str, str]] = {}
    for node in compiled.program.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace == "linearize":
            name, site = node.target._opname, str(node.meta.get("linearize_scope", "")).rpartition(".")[2]
            place = FAR_FIELD.get(name, 0)
            far = len(node.args) > place and node.args[place] is not None
            found.setdefault(site, {})[name] = lowering_of(name, flavour, far)
    return [
        LoweringEntry(
            site=entry.site, module=entry.module, mixer=entry.label(), operators=found.get(str(entry.site), {})
        )
        for entry in compiled.plan.entries
    ]


def _state_entry(port: Port) -> StateEntry:
    spec = port.state
    parts = [PartEntry(name=p.name, start=p.start, shape=list(p.shape), dtype=p.dtype) for p in port.parts]
    return StateEntry.model_validate(
        {
            "in": port.past,
            "out": port.present,
            "shape": _shape(spec.shape, spec.batched, spec.grows),
            "dtype": _short(spec.dtype),
            "grows": port.grows,
            "parts": parts or None,
        }
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
    if kind in ("linearized-torchscript", "linearized-pt2", "linearized-pte"):
        raise ArtifactError(
            f"{path} describes a {kind.removeprefix('linearized-')} export; this reads ONNX exports only"
        )
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
