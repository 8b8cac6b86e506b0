"""A compiled model on disk: `linearize.json` (what it is), `graph.json` (what it computes), `model.safetensors`.

Written whole or not at all, readable without executing anything. The graph is the rewritten one before lowering, with
weights under the source's names, so that a later version can lower it better.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from safetensors.torch import save as serialize
from torch import Tensor, fx, nn

from linearize.errors import ArtifactError
from linearize.files import new_directory, write_atomically
from linearize.mixers import Mixer, build_mixer, mixer_names
from linearize.plan import Plan, PlanEntry, first_problem
from linearize.program import LEAF, MIXERS, Program
from linearize.report import Report
from linearize.runtime.card import CARD, model_card
from linearize.runtime.config_json import CONFIG, config_json
from linearize.runtime.graph_json import graph_from_json, graph_to_json
from linearize.runtime.saved_leaves import LIBRARY, add_leaves, check_leaves, leaf_from_json, leaf_tensors, leaf_to_json
from linearize.spec import AttentionSpec, NoMatch, Site, SiteNodes

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel

FORMAT = 1
KIND = "linearized-model"
MANIFEST, GRAPH, WEIGHTS = "linearize.json", "graph.json", "model.safetensors"


class Manifest(BaseModel):
    """The contents of linearize.json."""

    model_config = ConfigDict(extra="forbid")

    format: int
    kind: str = KIND
    model_name: str
    captured_by: str
    vocab_size: int | None
    max_positions: int | None
    padding_moves_positions: bool = True
    stateless_reason: str
    source_config: dict[str, Any] | None
    notes: list[str]
    sites: list[dict[str, Any]]
    plan: Plan
    report: Report
    shared: dict[str, str]
    buffers: list[str]
    files: list[str]


def save(model: LinearizedModel, directory: str | Path) -> Path:
    """See `LinearizedModel.save_pretrained`."""
    contents, tensors = _contents(model)
    with new_directory(directory) as folder:
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / WEIGHTS).chmod(0o644)
        for name, content in contents.items():
            (folder / name).write_bytes(content)
    return Path(directory)


def save_over(model: LinearizedModel, directory: str | Path, state_dict: dict[str, Tensor]) -> Path:
    """`save` with the values of `state_dict` where it has them, into a directory that may hold other files: each file
    is replaced whole, the manifest last, so that what a reader finds fits together or is refused."""
    contents, tensors = _contents(model, state_dict)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MANIFEST).unlink(missing_ok=True)
    write_atomically(folder / WEIGHTS, serialize(tensors, metadata={"format": "pt"}))
    for name, content in sorted(contents.items(), key=lambda item: item[0] == MANIFEST):
        write_atomically(folder / name, content)
    return folder


def _contents(
    model: LinearizedModel, state_dict: dict[str, Tensor] | None = None
) -> tuple[dict[str, bytes], dict[str, Tensor]]:
    """Every file but the weights, and the weights."""
    check_savable(model)
    tensors, shared = _unique_tensors(model.source.module, state_dict or {})
    return contents_beside(model, shared), tensors


def check_savable(model: LinearizedModel) -> None:
    """Raises ArtifactError where something of the model runs Python code that is not transformers' own."""
    check_leaves(model.source)


def contents_beside(model: LinearizedModel, shared: dict[str, str]) -> dict[str, bytes]:
    """Every file but the weights; `shared`: other names of a tensor -> the one that it is stored under."""
    program = model.source
    manifest = Manifest(
        format=FORMAT,
        model_name=program.model_name,
        captured_by=program.captured_by,
        vocab_size=program.vocab_size,
        max_positions=program.max_positions,
        padding_moves_positions=program.padding_moves_positions,
        stateless_reason=program.stateless_reason,
        source_config=_plain(program.source_config),
        notes=list(program.notes),
        sites=[_site_to_json(site) for site in program.sites],
        plan=model.plan,
        report=model.report,
        shared=shared,
        buffers=sorted(name for name, _ in program.module.named_buffers(remove_duplicate=False)),
        files=sorted(model.files),
    )
    contents = {CARD: model_card(model).encode(), **model.files}
    if manifest.source_config is not None:
        contents[CONFIG] = json.dumps(config_json(manifest.source_config), indent=1).encode()
    contents[GRAPH] = json.dumps(_rows(program), separators=(",", ":")).encode()
    contents[MANIFEST] = manifest.model_dump_json(indent=1).encode()
    return contents


def _rows(program: Program) -> list[dict[str, Any]]:
    """graph.json: a row a node, those of opaque leaves with what is known of them."""
    rows = graph_to_json(program.graph)
    for node, row in zip(program.graph.nodes, rows, strict=True):
        if LEAF in node.meta:
            row[LEAF] = leaf_to_json(node, program.module.get_submodule(str(node.target)))
    return rows


def _unique_tensors(module: nn.Module, given: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors by name, each storage once; other names of the same tensor -> the name it is stored under)."""
    first: dict[tuple[int, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    for name, tensor in named_tensors(module):
        if tensor.device.type == "meta":
            raise ArtifactError(f"{name} has no values (meta device); load the weights before saving")
        key = (tensor.data_ptr(), *tensor.shape)
        if tensor.numel() and key in first:
            shared[name] = first[key]
            continue
        first[key] = name
        tensors[name] = given.get(name, tensor).detach().cpu().contiguous().clone()
    return tensors, shared


def named_tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and persistent buffers, every name of a shared one included; of opaque leaves all buffers."""
    parameters = list(module.named_parameters(remove_duplicate=False))
    known = set(module.state_dict())
    for name, part in module.named_modules():
        if type(part).__module__.startswith(LIBRARY):
            known |= {f"{name}.{own}" for own, _ in leaf_tensors(part)}
    return parameters + [item for item in module.named_buffers(remove_duplicate=False) if item[0] in known]


def _plain(config: dict[str, Any] | None) -> dict[str, Any] | None:
    """The config with everything that JSON has no form for (dtypes, ...) as text."""
    return None if config is None else json.loads(json.dumps(config, default=str))


def _site_to_json(site: Site | NoMatch) -> dict[str, Any]:
    return {"matched": site.matched, **asdict(site)}


def _site_from_json(data: dict[str, Any]) -> Site | NoMatch:
    data = {key: tuple(value) if isinstance(value, list) else value for key, value in data.items()}
    if not data.pop("matched"):
        return NoMatch(**data)
    attention = AttentionSpec.from_dict(data.pop("attention"))
    return Site(attention=attention, nodes=SiteNodes(**data.pop("nodes")), **data)


def read(directory: str | Path) -> tuple[Program, Plan, Report, dict[str, bytes]]:
    """(rewritten program, plan, report, tokenizer files) of a saved model; see `linearize.load` for the errors."""
    folder = Path(directory)
    manifest = read_manifest(folder)
    rows = _read_json(folder / GRAPH)
    if not isinstance(rows, list):
        raise ArtifactError(f"{folder / GRAPH} is no list of nodes")
    tensors = _read_weights(folder / WEIGHTS, manifest.shared)
    sites = tuple(_sites(manifest, folder))
    module = _module(_graph(rows), tensors, sites, manifest, _leaf_rows(rows))
    program = Program(
        module=module,
        model_name=manifest.model_name,
        captured_by=manifest.captured_by,
        vocab_size=manifest.vocab_size,
        sites=sites,
        state_names=tuple(str(n.target) for n in module.graph.nodes if "state" in n.meta),
        notes=tuple(manifest.notes),
        stateless_reason=manifest.stateless_reason,
        max_positions=manifest.max_positions,
        padding_moves_positions=manifest.padding_moves_positions,
        source_config=manifest.source_config,
    )
    files = {name: _read_bytes(folder / _inside(name)) for name in manifest.files}
    return program, manifest.plan, manifest.report, files


def _graph(rows: list[dict[str, Any]]) -> fx.Graph:
    graph = graph_from_json(rows)
    for node, row in zip(graph.nodes, rows, strict=True):
        if LEAF in row:
            node.meta[LEAF] = leaf_from_json(row[LEAF])
    return graph


def _leaf_rows(rows: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    return {row["target"]: row[LEAF] for row in rows if LEAF in row}


def read_manifest(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise ArtifactError(f"{folder} is not a directory")
    if not (folder / MANIFEST).is_file():
        raise ArtifactError(f"{folder} holds no {MANIFEST}: not written by linearize (compile a model into it first)")
    data = _read_json(folder / MANIFEST)
    kind = data.get("kind") if isinstance(data, dict) else None
    if kind != KIND:
        raise ArtifactError(f"{folder} holds a {kind!r}, not a {KIND!r}; load the directory that compile wrote")
    version = data.get("format")
    if version != FORMAT:
        raise ArtifactError(f"{folder / MANIFEST} has format {version!r}; this version of linearize reads {FORMAT}")
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        raise ArtifactError(f"{folder / MANIFEST}: {first_problem(error)}") from error


def _sites(manifest: Manifest, folder: Path) -> list[Site | NoMatch]:
    try:
        return [_site_from_json(data) for data in manifest.sites]
    except (KeyError, TypeError) as error:
        raise ArtifactError(f"{folder / MANIFEST}: sites: {error}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_bytes(path))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is damaged: not JSON ({error})") from error


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ArtifactError(f"cannot read {path}: {error.strerror or error}") from error


def _inside(name: str) -> str:
    if Path(name).name != name:
        raise ArtifactError(f"{MANIFEST} lists the file {name!r}, which is outside the directory")
    return name


def _read_weights(path: Path, shared: dict[str, str]) -> dict[str, Tensor]:
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise ArtifactError(f"cannot read {path}: {error}") from error
    for alias, name in shared.items():
        if name not in tensors:
            raise ArtifactError(f"{path} lacks {name!r}, which {alias!r} is shared with")
        tensors[alias] = tensors[name]
    return tensors


def _module(
    graph: fx.Graph,
    tensors: dict[str, Tensor],
    sites: tuple[Site | NoMatch, ...],
    manifest: Manifest,
    leaves: dict[str, dict[str, Any]],
) -> fx.GraphModule:
    """The graph over the stored tensors, its mixers built from the plan and its leaves from the config, all filled."""
    mixers = nn.ModuleDict()
    for site in sites:
        if isinstance(site, Site):
            entry = manifest.plan.entry(site.index)
            mixer = _build(entry, site)
            mixers[str(site.index)] = mixer
            _fill(mixer, f"{MIXERS}.{site.index}.", tensors)
    wanted = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    missing = sorted(name for name in wanted if name not in tensors)
    if missing:
        raise ArtifactError(f"{WEIGHTS} lacks {missing[0]!r}, which the graph reads ({len(missing)} missing)")
    root = nn.Module()
    parameters: dict[int, nn.Parameter] = {}
    buffers = set(manifest.buffers)

    def stored(name: str) -> Tensor | None:
        tensor = tensors.get(name)
        if tensor is None or name in buffers or not tensor.is_floating_point():
            return tensor
        return parameters.setdefault(id(tensor), nn.Parameter(tensor))

    add_leaves(root, leaves, manifest.model_name, manifest.source_config, stored)
    for name in wanted:
        _assign(root, name, stored(name))  # type: ignore[arg-type]
    root.add_module(MIXERS, mixers)
    return fx.GraphModule(root, graph, class_name="Linearized")


def _build(entry: PlanEntry, site: Site) -> Mixer:
    if entry.mixer not in mixer_names():
        raise ArtifactError(
            f"site {entry.site} ({entry.module}) is a {entry.mixer!r}, and no mixer of that name is registered: import "
            "the file that defines it (by linearize.register_mixer) before linearize.load, or name it: --mixers FILE.py"
        )
    return build_mixer(entry.mixer, site.attention, entry.options)


def _fill(mixer: nn.Module, prefix: str, tensors: dict[str, Tensor]) -> None:
    own = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    try:
        mixer.load_state_dict(own)
    except RuntimeError as error:
        raise ArtifactError(f"{WEIGHTS}: {prefix.rstrip('.')} does not fit its plan: {error}") from error


def _assign(root: nn.Module, name: str, tensor: Tensor) -> None:
    *path, leaf = name.split(".")
    module = root
    for part in path:
        if part not in module._modules:
            module.add_module(part, nn.Module())
        module = module._modules[part]  # type: ignore[assignment]
    if isinstance(tensor, nn.Parameter):
        module.register_parameter(leaf, tensor)
    else:
        module.register_buffer(leaf, tensor)
