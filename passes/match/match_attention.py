"""Match every softmax attention: find cores, read masks and surroundings, prove them. Reads only."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from linearize.passes.match import projections, region, surroundings
from linearize.passes.match.cores import Core, find_cores
from linearize.passes.match.masks import MaskReading, read_mask, read_score_mask
from linearize.passes.match.near_miss import Refusal, refused
from linearize.passes.match.rotation import read_rope
from linearize.passes.match.validate import core_disagreement
from linearize.pipeline import Keeps, Stage
from linearize.program import Program, node_scope
from linearize.rewriting.walk import is_op, shape_of
from linearize.spec import AttentionSpec, MaskSpec, NoMatch, RopeSpec, Site, SiteNodes

aten = torch.ops.aten
MATCHED_MASKS = ("causal", "sliding", "chunked")


@dataclass(frozen=True)
class MatchAttention:
    """Fills `program.sites`: a Site for every attention that is proved, a NoMatch with its reason for the others.

    Softmaxes that are no attention (expert routers) are listed in `program.notes`.
    """

    name: ClassVar[str] = "match_attention"
    stage: ClassVar[Stage] = Stage.MATCH
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        flow = region.read_flow(program)
        flow = replace(flow, absolute=surroundings.absolute_positions(flow))
        sites: list[Site | NoMatch] = []
        notes = list(program.notes)
        for core in find_cores(program, flow.activations):
            if isinstance(core, Refusal) and not core.is_attention:
                notes.append(f"{node_scope(core.anchor) or core.anchor.name}: left alone, {core.reason}")
            elif isinstance(core, Refusal):
                sites.append(refused(len(sites), core))
            else:
                sites.append(match_core(flow, core, len(sites)))
        return program.replace(sites=tuple(sites), notes=tuple(notes))


def match_core(flow: region.Flow, core: Core, index: int) -> Site | NoMatch:
    """One core to a Site, or to a NoMatch that says which fact could not be established."""
    reason = _shape_refusal(core)
    if reason is not None:
        return refused(index, Refusal(core.anchor, reason, (*core.chain, core.query, core.key, core.value)))
    reading = _mask_of(flow, core)
    mask, reason = reading.spec, reading.reason
    if mask is None or mask.kind not in MATCHED_MASKS:
        why = reason or f"its mask is {mask}: {_mask_help(mask)}"
        chain = core.chain if core.mask is None else (*core.chain, core.mask)
        return refused(index, Refusal(core.anchor, why, chain, core.mask))
    key, value = _kv_nodes(flow, core)
    spec = replace(_spec(flow, core, key, value, mask), alibi=reading.alibi)
    reason = core_disagreement(flow.program, core, key, value, spec)
    if reason is not None:
        chain = tuple(dict.fromkeys((core.output, *core.chain, core.query, core.key, core.value)))
        return refused(index, Refusal(core.anchor, reason, chain))
    return _surroundings(flow, core, index, key, value, spec)


def _shape_refusal(core: Core) -> str | None:
    query, key, value = (shape_of(node) for node in (core.query, core.key, core.value))
    if not len(query) == len(key) == len(value) == 4:
        return f"query, key and value have ranks {len(query)}, {len(key)}, {len(value)}, not 4"
    if isinstance(query[2], int):
        return f"the query axis has the fixed length {query[2]}, not the sequence's"
    if str(key[2]) != str(query[2]) and _is_part(query[2], key[2]):
        return f"the queries are a part of the sequence, {query[2]} of {key[2]} (attention in pieces)"
    if isinstance(key[2], int) or str(key[2]) != str(query[2]):
        return f"the key axis has length {key[2]}, not the sequence's {query[2]} (cross-attention or compressed keys)"
    if str(value[2]) != str(key[2]):
        return f"there are {value[2]} values for {key[2]} keys"
    if not all(isinstance(dim, int) for dim in (query[1], query[3], key[1], key[3], value[1], value[3])):
        return "the number of heads or the head dim is not constant"
    return None


def _is_part(queries: object, keys: object) -> bool:
    """Whether the number of queries is computed from the number of keys: a half of them, say."""
    if isinstance(queries, int) or isinstance(keys, int):
        return False
    symbols = [size.node.expr.free_symbols for size in (queries, keys)]  # type: ignore[attr-defined]
    whole = keys.node.expr.is_Symbol  # type: ignore[attr-defined]
    return bool(whole) and symbols[0] == symbols[1]


def _mask_of(flow: region.Flow, core: Core) -> MaskReading:
    if core.product is not None:
        assert core.scores is not None
        return read_score_mask(
            flow.program,
            core.scores,
            core.product,
            flow.activations,
            int(shape_of(core.product)[1]),
            core.layout.arrange,
        )
    return read_mask(flow.program, core.mask, core.causal, flow.activations)


def _mask_help(mask: MaskSpec | None) -> str:
    if mask is not None and mask.kind == "full":
        return "every query sees every key, which no decoder's self-attention does"
    if mask is not None and mask.kind == "prefix":
        return f"the first {mask.size} keys are seen by every query, which no causal mixer does"
    return "only causal, sliding and chunked masks are raised"


def _kv_nodes(flow: region.Flow, core: Core) -> tuple[fx.Node, fx.Node]:
    heads = int(shape_of(core.query)[1])
    key, value = (region.before_repeat(flow, node, heads) for node in (core.key, core.value))
    if shape_of(key)[1] != shape_of(value)[1]:
        return core.key, core.value
    return key, value


def _spec(flow: region.Flow, core: Core, key: fx.Node, value: fx.Node, mask: MaskSpec) -> AttentionSpec:
    _, heads, _, dim = shape_of(core.query)
    return AttentionSpec(
        heads=int(heads),
        kv_heads=int(shape_of(key)[1]),
        head_dim=int(dim),
        value_dim=int(shape_of(value)[3]),
        hidden_dim=0,
        scale=core.scale,
        mask=mask,
        softcap=core.softcap,
        sinks=core.sinks is not None,
        dtype=str(core.query.meta["val"].dtype).removeprefix("torch."),
    )


def _surroundings(flow: region.Flow, core: Core, index: int, key: fx.Node, value: fx.Node, spec: AttentionSpec) -> Site:
    inputs = sorted({p for node in (core.query, key, value) for p in region.projections_of(flow, node)})
    output = region.output_projection(flow, core.output)
    width = _output_width(output)
    hidden = region.hidden_state(flow, inputs, width)
    names = region.parameter_names(flow, [*inputs, *([output] if output is not None else [])])
    plain_query, plain_key, rope, misses = _unrotated(flow, core.query, key)
    spec = replace(spec, rope=rope, hidden_dim=int(shape_of(hidden)[-1]) if hidden is not None else 0)
    extras = [*_extras(flow, spec, inputs, core.query), *surroundings.after_core(flow, core.output, output)]
    if surroundings.is_parallel(flow, hidden, inputs, output):
        extras.append("parallel-block")
    claims = [
        projections.read_projection(flow, "query", plain_query or core.query),
        projections.read_projection(flow, "key", plain_key or key),
        projections.read_projection(flow, "value", value),
        projections.read_output(flow, output),
    ]
    return Site(
        index=index,
        module=region.owner_name(names, node_scope(core.anchor)) or core.anchor.name,
        attention=spec,
        nodes=SiteNodes(
            core=core.output.name,
            query=core.query.name,
            key=key.name,
            value=value.name,
            mask=core.mask.name if core.mask is not None else None,
            sinks=core.sinks.name if core.sinks is not None else None,
            hidden=hidden.name if hidden is not None else None,
            query_unrotated=plain_query.name if plain_query is not None else None,
            key_unrotated=plain_key.name if plain_key is not None else None,
        ),
        projections=names,
        extras=tuple(extras),
        near_misses=misses,
        projected=tuple(claim for claim in claims if claim is not None),
        positions=_positions(flow, spec, misses),
    )


def _positions(flow: region.Flow, spec: AttentionSpec, misses: tuple[str, ...]) -> str:
    if spec.rope is not None:
        return "rope"
    if spec.alibi:
        return "alibi"
    return "unknown" if misses else flow.absolute or "none"


def _output_width(output: fx.Node | None) -> int | None:
    shape = shape_of(output) if output is not None else ()
    return int(shape[-1]) if shape and isinstance(shape[-1], int) else None


def _unrotated(
    flow: region.Flow, query: fx.Node, key: fx.Node
) -> tuple[fx.Node | None, fx.Node | None, RopeSpec | None, tuple[str, ...]]:
    """Query and key before the rotation, and the rotation; (None, None, None, why) where it cannot be proved."""
    kept = flow.kept
    plain_query, plain_key = (region.before_rotation(flow, node) or kept.get(node.name) for node in (query, key))
    if plain_query is None or plain_key is None:
        return None, None, None, ("rope not recovered: no node of the same shape stands before the rotation",)
    if plain_query is query and plain_key is key:
        return query, key, None, ()
    if flow.program.valueless:
        return None, None, None, ("rope not recovered: the meta device holds no values to prove a rotation by",)
    found = [read_rope(flow, a, b) for a, b in ((plain_query, query), (plain_key, key))]
    if found[0] is None or found[0] != found[1]:
        return None, None, None, ("rope not recovered: what lies before query or key is not a rotation by value",)
    return plain_query, plain_key, found[0], ()


def _extras(flow: region.Flow, spec: AttentionSpec, projections: list[fx.Node], query: fx.Node) -> tuple[str, ...]:
    extras = []
    if spec.kv_heads == 1 < spec.heads:
        extras.append("mqa")
    elif spec.kv_heads < spec.heads:
        extras.append("gqa")
    if spec.rope is not None:
        extras.append(str(spec.rope))
    if len(projections) == 1:
        extras.append("fused-qkv")
    if _has_norm(flow, query):
        extras.append("qk-norm")
    if spec.softcap:
        extras.append(f"softcap({spec.softcap:g})")
    if spec.sinks:
        extras.append("sinks")
    if spec.alibi:
        extras.append("alibi")
    if spec.mask.padding:
        extras.append("padding")
    return tuple(extras)


def _has_norm(flow: region.Flow, query: fx.Node) -> bool:
    between = region.cone([query], stop=region.projections_of(flow, query)) & flow.activations
    norms = (aten.rsqrt, aten.rms_norm, aten.layer_norm, aten._fused_rms_norm, aten.native_layer_norm)
    return any(is_op(node, *norms) for node in between - set(region.projections_of(flow, query)))
