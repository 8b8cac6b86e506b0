"""What a mixer costs at a site, from its own code: built on the meta device, so nothing is allocated or computed.

State and weight bytes are those of the tensors that the mixer declares; bytes moved, operations and calls are counted
while its forward runs on shapes alone, for one token with the context behind it and for a prompt as long as that.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from linearize.mixers import Mixer, build_mixer
from linearize.passes.lower import LOWER_PASSES
from linearize.passes.rewrite import CarryHistory, InsertMixers
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.planner.counting import Call, Counting
from linearize.program import MASK, POSITIONS, TOKENS, Program, StateTensor
from linearize.rewriting.walk import cone
from linearize.spec import AttentionSpec, Site


@dataclass(frozen=True)
class Cost:
    """Of one site. `calls` are the operators of one decoded token."""

    state_bytes: int
    weight_bytes: int
    moved_bytes: int
    operations: int
    prefill_operations: int
    calls: tuple[Call, ...]


def site_cost(spec: AttentionSpec, mixer: str, options: dict[str, Any], context: int, batch: int = 1) -> Cost:
    """One site's mixer with `context` tokens behind it, for `batch` sequences.

    Raises:
        RecipeError: unknown name or options.
    """
    return _site_cost(spec, mixer, json.dumps(options, sort_keys=True), context, batch)


@functools.lru_cache(maxsize=4096)
def _site_cost(spec: AttentionSpec, mixer: str, options: str, context: int, batch: int) -> Cost:
    made = on_meta(spec, mixer, options)
    decode = count(made, batch, 1, context)
    prefill = count(made, batch, context, 0)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in made.parameters())
    return Cost(
        state_bytes=sum(tensor.bytes(batch, context) for tensor in made.state()),
        weight_bytes=weights,
        moved_bytes=sum(call.bytes for call in decode),
        operations=sum(call.operations for call in decode),
        prefill_operations=sum(call.operations for call in prefill),
        calls=tuple(decode),
    )


def state_bytes(spec: AttentionSpec, mixer: str, options: dict[str, Any], context: int, batch: int = 1) -> int:
    """Exactly what a compiled model allocates for the site."""
    made = on_meta(spec, mixer, json.dumps(options, sort_keys=True))
    return sum(tensor.bytes(batch, context) for tensor in made.state())


@functools.lru_cache(maxsize=4096)
def on_meta(spec: AttentionSpec, mixer: str, options: str) -> Mixer:
    given = json.loads(options)
    try:
        with torch.device("meta"):
            return build_mixer(mixer, spec, given)
    except NotImplementedError:  # its initialisation reads values, as that of MLA does
        return build_mixer(mixer, spec, given).to("meta")


def count(mixer: Mixer, batch: int, length: int, context: int) -> list[Call]:
    """The operators of a call with `length` new tokens."""
    given = inputs(mixer, batch, length, context)
    states = [_state(tensor, batch, context) for tensor in mixer.state()]
    with torch.no_grad(), Counting() as counting:
        mixer(*given, *states)
    return counting.calls


def inputs(mixer: Mixer, batch: int, length: int, context: int = 0) -> list[Tensor]:
    """What forward takes before the state, without values; a cache of another site is as long as all tokens so far."""
    spec, dtype = mixer.spec, mixer.dtype
    query, key = (batch, spec.heads, length, spec.head_dim), (batch, spec.kv_heads, length, spec.head_dim)
    shapes = {
        "query_unrotated": query, "key_unrotated": key, "hidden": (batch, length, spec.hidden_dim),
        "sinks": (spec.heads,),
    }  # fmt: skip
    value = (batch, spec.kv_heads, length, spec.value_dim)
    for need in mixer.needs:
        if "@" in need:  # key@3: the cache of site 3
            width = spec.head_dim if need.startswith("key") else spec.value_dim
            shapes[need] = (batch, spec.kv_heads, context + length, width)
    tensors = [torch.empty(shape, dtype=dtype, device="meta") for shape in (query, key, value)]
    tensors += [torch.empty(shapes[need], dtype=dtype, device="meta") for need in mixer.needs]
    mask = torch.empty(batch, length, dtype=torch.bool, device="meta")
    return [*tensors, mask, torch.empty(batch, length, dtype=torch.int64, device="meta")]


def _state(tensor: StateTensor, batch: int, context: int) -> Tensor:
    shape = tuple(context if dim == tensor.grows else size for dim, size in enumerate(tensor.shape))
    return torch.empty((batch, *shape) if tensor.batched else shape, dtype=tensor.dtype, device="meta")


# ---- the rest of the model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What a model costs whatever its sites become. `feeding` are, by site, the operators that only its attention
    reads (projections of queries, keys and values), which go where the attention is dropped; `asking` those of them
    that are left where it reads another's keys and values."""

    state_bytes: int
    weight_bytes: int
    calls: tuple[Call, ...]
    feeding: dict[int, tuple[Call, ...]]
    asking: dict[int, tuple[Call, ...]]


def base_cost(teacher: Program, batch: int = 1) -> Base:
    """Of a raised program, one token at a time."""
    weights = sum(parameter.numel() * parameter.element_size() for parameter in teacher.module.parameters())
    lowered = run_pipeline(teacher, LOWER_PASSES)
    by_node = _count_nodes(lowered, batch)
    nodes = lowered.nodes_by_name()
    output = next(node for node in lowered.graph.nodes if node.op == "output")
    cores = [nodes[site.nodes.core] for site in lowered.matched]
    always = cone([output], cores) - set(cores)
    feeding: dict[int, tuple[Call, ...]] = {}
    asking: dict[int, tuple[Call, ...]] = {}
    taken: set[fx.Node] = set(always)
    for site, core in zip(lowered.matched, cores, strict=True):
        own = [node for node in lowered.graph.nodes if node in cone([core]) - taken - set(cores)]
        taken |= set(own)
        feeding[site.index] = tuple(call for node in own for call in by_node.get(node, ()))
        left = cone([node for node in core.all_input_nodes if node not in core.args[1:3]])
        asking[site.index] = tuple(call for node in own if node in left for call in by_node.get(node, ()))
    calls = tuple(call for node in lowered.graph.nodes if node in always for call in by_node.get(node, ()))
    return Base(fixed_state_bytes(teacher, batch), weights, calls, feeding, asking)


def fixed_state_bytes(teacher: Program, batch: int = 1) -> int:
    """Of what is carried beside the sites' states: the counts of tokens, and what other layers mix over time."""
    entries = tuple(PlanEntry(site=site.index, module=site.module, mixer="drop") for site in teacher.matched)
    program = run_pipeline(teacher, [InsertMixers(Plan(entries=entries)), CarryHistory()])
    specs: list[StateTensor] = [node.meta["state"] for node in program.placeholders() if "state" in node.meta]
    return sum(spec.bytes(batch) for spec in specs)


def _count_nodes(program: Program, batch: int) -> dict[fx.Node, tuple[Call, ...]]:
    """The calls of every node of a graph when it runs on one token."""
    found: dict[fx.Node, tuple[Call, ...]] = {}

    class Counter(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            with Counting() as counting:
                result = super().run_node(n)
            found[n] = tuple(counting.calls)
            return result

        def fetch_attr(self, target: str) -> Any:
            value = super().fetch_attr(target)
            return mode.from_tensor(value) if isinstance(value, Tensor) else value

    with FakeTensorMode(allow_non_fake_inputs=True) as mode, torch.no_grad():
        ids = torch.ones(batch, 1, dtype=torch.int64, device=program.device)
        made = {TOKENS: ids, MASK: ids, POSITIONS: ids}
        Counter(program.module).run(*[made[str(node.target)] for node in program.placeholders()])
    return found


def decode_calls(
    base: Base, sites: Sequence[Site], entries: Sequence[PlanEntry], context: int, batch: int
) -> list[Call]:
    """Every operator of one decoded token of a planned model."""
    by_site = {entry.site: entry for entry in entries}
    calls = list(base.calls)
    for site in sites:
        entry = by_site[site.index]
        calls += site_cost(site.attention, entry.mixer, entry.options, context, batch).calls
        if entry.mixer != "drop":
            calls += (base.asking if entry.mixer == "share" else base.feeding)[site.index]
    return calls
