"""Every matched attention becomes one `linearize::attention`: kv heads not repeated, mask by meaning, padding apart."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import fx

from linearize.pipeline import Keeps, Stage
from linearize.program import MASK, Program
from linearize.rewriting.editor import Editor
from linearize.spec import NoMatch, Site

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
        bias = _padding_bias(editor, program)
        sites: list[Site | NoMatch] = []
        for site in program.sites:
            sites.append(_raise(editor, site, nodes, bias) if isinstance(site, Site) else site)
        return program.replace(module=editor.finish(), sites=tuple(sites))


def _padding_bias(editor: Editor, program: Program) -> fx.Node | None:
    """bool [B,1,1,S], True where a key is a real token; None when the source takes no mask or nothing reads it."""
    if not any(site.attention.mask.padding for site in program.matched):
        return None
    mask = next(node for node in editor.graph.nodes if node.op == "placeholder" and node.target == MASK)
    inputs = [node for node in editor.graph.nodes if node.op == "placeholder"]
    with editor.graph.inserting_after(inputs[-1]):
        real = editor.call(aten.ne.Scalar, mask, 0)
    with editor.graph.inserting_after(real):
        rank3 = editor.call(aten.unsqueeze.default, real, 1)
    with editor.graph.inserting_after(rank3):
        return editor.call(aten.unsqueeze.default, rank3, 1)


def _raise(editor: Editor, site: Site, nodes: dict[str, fx.Node], bias: fx.Node | None) -> Site:
    spec, old = site.attention, nodes[site.nodes.core]
    query, key, value = (nodes[name] for name in (site.nodes.query, site.nodes.key, site.nodes.value))
    with editor.at(old):
        new = editor.call(
            torch.ops.linearize.attention.default,
            query, key, value, bias if spec.mask.padding else None,
            scale=spec.scale, softcap=spec.softcap, causal=True,
            window=spec.mask.size if spec.mask.kind == "sliding" else 0,
            origin=old,
        )  # fmt: skip
    editor.replace(old, new)
    return replace(site, nodes=replace(site.nodes, core=new.name))
