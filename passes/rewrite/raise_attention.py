"""Every matched attention becomes one `linearize::attention`: kv heads not repeated, mask by meaning, padding apart."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import fx

from linearize.pipeline import Keeps, Stage
from linearize.program import MASK, TOKENS, Program
from linearize.rewriting.editor import Editor
from linearize.spec import NoMatch, Site
from linearize.weights import ATTACHED

aten = torch.ops.aten


@dataclass(frozen=True)
class RaiseAttention:
    """Exact at real tokens. Queries that are padding attend to nothing (0), where sources give them an average."""

    name: ClassVar[str] = "raise_attention"
    stage: ClassVar[Stage] = Stage.REWRITE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        module = program.copy_graph()
        editor = Editor(module, self.name)
        nodes = {node.name: node for node in module.graph.nodes}
        real = _real_tokens(editor, program)
        sites: list[Site | NoMatch] = []
        for site in program.sites:
            sites.append(_raise(editor, site, nodes, real) if isinstance(site, Site) else site)
        return program.replace(module=editor.finish(), sites=tuple(sites))


def _real_tokens(editor: Editor, program: Program) -> tuple[fx.Node | None, fx.Node | None]:
    """(bool [B,T], bool [B,1,1,T]), True where a key is a real token, the first only where some attention counts
    positions; (None, None) when the source takes no mask or nothing reads it."""
    counted = any(_counts_positions(site) for site in program.matched)
    if not counted and not any(site.attention.mask.padding for site in program.matched):
        return None, None
    inputs = [node for node in editor.graph.nodes if node.op == "placeholder"]
    mask = next((node for node in inputs if node.target == MASK), None)
    body = next(node for node in editor.graph.nodes if node.op not in ("placeholder", "get_attr"))
    if mask is None:
        tokens = next(node for node in inputs if node.target == TOKENS)
        with editor.at(body):
            return editor.call(aten.ones_like.default, tokens, dtype=torch.bool), None
    with editor.graph.inserting_after(inputs[-1]):
        real = editor.call(aten.ne.Scalar, mask, 0)
    with editor.graph.inserting_after(real):
        rank3 = editor.call(aten.unsqueeze.default, real, 1)
    with editor.graph.inserting_after(rank3):
        return real, editor.call(aten.unsqueeze.default, rank3, 1)


def _counts_positions(site: Site) -> bool:
    return bool(site.attention.alibi) or site.attention.mask.kind == "chunked"


def _raise(editor: Editor, site: Site, nodes: dict[str, fx.Node], real: tuple[fx.Node | None, fx.Node | None]) -> Site:
    spec, old = site.attention, nodes[site.nodes.core]
    query, key, value = (nodes[name] for name in (site.nodes.query, site.nodes.key, site.nodes.value))
    sinks = (nodes[site.nodes.sinks],) if spec.sinks and site.nodes.sinks is not None else ()
    with editor.at(old):
        bias = _position_bias(editor, site, *real) if _counts_positions(site) else real[1]
        new = editor.call(
            torch.ops.linearize.attention.default,
            query, key, value, bias if spec.mask.padding or _counts_positions(site) else None, *sinks,
            scale=spec.scale, softcap=spec.softcap, causal=True,
            window=spec.mask.size if spec.mask.kind == "sliding" else 0,
            origin=old,
        )  # fmt: skip
    editor.replace(old, new)
    return replace(site, nodes=replace(site.nodes, core=new.name))


def _position_bias(editor: Editor, site: Site, real: fx.Node | None, keys: fx.Node | None) -> fx.Node:
    """`ops.position_bias` for whole sequences, as operators of the graph."""
    spec = site.attention
    count = editor.call(aten._to_copy.default, real, dtype=torch.int64)
    ranks = editor.call(aten.cumsum.default, count, 1)
    visible = keys if spec.mask.padding else None
    if spec.mask.kind == "chunked":
        every = editor.call(aten.ones_like.default, count)
        places = ranks if spec.mask.from_first_token else editor.call(aten.cumsum.default, every, 1)
        number = editor.call(
            aten.div.Tensor_mode, editor.call(aten.sub.Tensor, places, 1), spec.mask.size, rounding_mode="floor"
        )
        same = editor.call(aten.unsqueeze.default, _pairs(editor, aten.eq.Tensor, number), 1)
        visible = same if visible is None else editor.call(aten.bitwise_and.Tensor, visible, same)
    if not spec.alibi:
        assert visible is not None
        return visible
    name = f"linearize_alibi_{site.index}"
    device = next((parameter.device for parameter in editor.module.parameters()), None)
    slopes = torch.tensor(spec.alibi, dtype=torch.float32, device=device).reshape(1, -1, 1, 1)
    if slopes.is_meta and hasattr(editor.module, ATTACHED):
        getattr(editor.module, ATTACHED).values[name] = torch.tensor(spec.alibi).reshape(1, -1, 1, 1)
    editor.module.register_buffer(name, slopes)
    distance = editor.call(aten.unsqueeze.default, _pairs(editor, aten.sub.Tensor, ranks), 1)
    bias = editor.call(aten.mul.Tensor, editor.graph.get_attr(name), distance)
    if visible is None:
        return bias
    hidden = editor.call(aten.bitwise_not.default, visible)
    return editor.call(aten.masked_fill.Scalar, bias, hidden, float("-inf"))


def _pairs(editor: Editor, operator: Callable[..., Any], numbers: fx.Node) -> fx.Node:
    """[B, T, S]: `operator` of a number of each key and of each query."""
    of_keys = editor.call(aten.unsqueeze.default, numbers, 1)
    return editor.call(operator, of_keys, editor.call(aten.unsqueeze.default, numbers, 2))
