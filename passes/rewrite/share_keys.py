"""Let raised attentions read the keys and values of another: what sharing a cache does to a whole sequence."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

from linearize.errors import RecipeError
from linearize.mixers.share import sharing_problem
from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import Editor


@dataclass(frozen=True)
class ShareKeys:
    """Lossy. `sources` gives, by site, the site whose keys and values it reads; of a raised program.

    Raises:
        RecipeError: a site cannot read the other's.
    """

    sources: Mapping[int, int]

    name: ClassVar[str] = "share_keys"
    stage: ClassVar[Stage] = Stage.REWRITE
    keeps: ClassVar[Keeps] = Keeps.LOSSY

    def run(self, program: Program) -> Program:
        module = program.copy_graph()
        editor = Editor(module, self.name)
        nodes = {node.name: node for node in module.graph.nodes}
        sites = {site.index: site for site in program.matched}
        for index, of in self.sources.items():
            site, source = sites[index], sites.get(of)
            problem = sharing_problem(site, source, "share" if of in self.sources else "keep")
            if problem is not None or source is None:
                raise RecipeError(f"site {index} ({site.module}): {problem}")
            core = nodes[site.nodes.core]
            core.args = (core.args[0], nodes[source.nodes.key], nodes[source.nodes.value], *core.args[3:])
            theirs = {name: getattr(source.nodes, name) for name in ("key", "value", "key_unrotated")}
            sites[index] = replace(site, nodes=replace(site.nodes, **theirs))
        changed = tuple(sites.get(site.index, site) for site in program.sites)
        return program.replace(module=editor.finish(), sites=changed)
