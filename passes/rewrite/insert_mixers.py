"""Put the planned mixers in the place of the raised attentions, and thread their state through the graph.

After this pass one graph serves prefill and decode: it takes T new tokens, T >= 1, and the state, and returns their
logits and the new state. `attention_mask` [B, T] says which of the T tokens are real.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx, nn

from linearize.errors import RecipeError
from linearize.mixers import Mixer, Share, build_mixer, mixer_class
from linearize.mixers.share import sharing_problem
from linearize.passes.rewrite.positions import offset_positions
from linearize.pipeline import Keeps, Stage
from linearize.plan import Plan
from linearize.program import MASK, MIXERS, TOKENS, Program, StateTensor
from linearize.rewriting.editor import Editor, release, remove_dead
from linearize.spec import Site

aten = torch.ops.aten
CACHES = {"key": "cache_k", "value": "cache_v"}  # of the mixer `keep`
SEEN = StateTensor("seen", (), torch.int64)
OFFSET = StateTensor("offset", (), torch.int64, batched=False)


@dataclass(frozen=True)
class InsertMixers:
    """Lossy: what each mixer equals before it is fitted is its own `starts_as`.

    Raises:
        RecipeError: the plan names a mixer that cannot replace its site, or options that the mixer does not take.
    """

    plan: Plan

    name: ClassVar[str] = "insert_mixers"
    stage: ClassVar[Stage] = Stage.REWRITE
    keeps: ClassVar[Keeps] = Keeps.LOSSY

    def run(self, program: Program) -> Program:
        module = program.copy_graph()
        editor = Editor(module, self.name)
        mixers = nn.ModuleDict()
        module.add_submodule(MIXERS, mixers)
        clock = _Clock(editor)
        new_state: list[fx.Node] = [clock.new_seen, clock.new_offset]
        nodes = {node.name: node for node in module.graph.nodes}
        for site in program.matched:
            entry = self.plan.entry(site.index)
            refusal = self._refusal(program, site)
            if refusal is not None:
                raise RecipeError(f"site {site.index} ({site.module}): {refusal}; plan keep there")
            mixer = build_mixer(entry.mixer, site.attention, entry.options).to(program.device)
            mixers[str(site.index)] = mixer
            new_state += _insert(editor, site, mixer, nodes, clock)
        _return(editor, new_state)
        release(module.graph)
        remove_dead(module.graph)
        limit = offset_positions(editor, clock.offset)
        finished = editor.finish()
        names = tuple(n.target for n in finished.graph.nodes if n.op == "placeholder" and "state" in n.meta)
        return program.replace(
            module=finished, state_names=names, stateless_reason=_stateless(program), max_positions=limit
        )


    def _refusal(self, program: Program, site: Site) -> str | None:
        entry = self.plan.entry(site.index)
        mixer = mixer_class(entry.mixer)
        try:
            refusal = mixer.refusal_with(site, entry.options)
        except (TypeError, ValueError) as error:
            return f"{entry.mixer}: {error}"
        if refusal is not None or not issubclass(mixer, Share):
            return refusal
        source = next((other for other in program.matched if other.index == entry.options["of"]), None)
        planned = self.plan.entry(source.index).mixer if source is not None else ""
        return sharing_problem(site, source, planned)


class _Clock:
    """Inputs that all mixers share: which new tokens are real, and the rank of each among its row's real tokens."""

    def __init__(self, editor: Editor) -> None:
        inputs = [node for node in editor.graph.nodes if node.op == "placeholder"]
        by_name = {str(node.target): node for node in inputs}
        if MASK not in by_name:
            by_name[MASK] = editor.add_input(MASK, after=by_name[TOKENS])
            by_name[MASK].meta["val"] = by_name[TOKENS].meta["val"]
            inputs = [node for node in editor.graph.nodes if node.op == "placeholder"]
        self.seen = editor.add_input(SEEN.name, inputs[-1], SEEN)
        self.offset = editor.add_input(OFFSET.name, self.seen, OFFSET)
        self.last_input = self.offset
        body = next(node for node in editor.graph.nodes if node.op not in ("placeholder", "get_attr"))
        with editor.at(body):
            self.mask = editor.call(aten.ne.Scalar, by_name[MASK], 0)
            count = editor.call(aten._to_copy.default, self.mask, dtype=torch.int64)
            ranks = editor.call(aten.cumsum.default, count, 1)
            before = editor.call(aten.sub.Scalar, self.seen, 1)
            self.positions = editor.call(aten.add.Tensor, ranks, editor.call(aten.unsqueeze.default, before, 1))
            total = editor.call(aten.sum.dim_IntList, count, [1])
            self.new_seen = editor.call(aten.add.Tensor, self.seen, total)
            length = editor.call(aten.sym_size.int, by_name[TOKENS], 1)
            self.new_offset = editor.call(aten.add.Tensor, self.offset, length)


def _insert(editor: Editor, site: Site, mixer: Mixer, nodes: dict[str, fx.Node], clock: _Clock) -> list[fx.Node]:
    """Replace one attention by a call of its mixer; returns the nodes of the mixer's new state."""
    states = []
    for tensor in mixer.state():
        named = StateTensor(f"layers_{site.index}_{tensor.name}", tensor.shape, tensor.dtype, tensor.grows)
        clock.last_input = editor.add_input(named.name, clock.last_input, named)
        states.append(clock.last_input)
    old = nodes[site.nodes.core]
    needed = [_needed(site, need, nodes) for need in mixer.needs]
    query, key, value = (nodes[name] for name in (site.nodes.query, site.nodes.key, site.nodes.value))
    with editor.at(old):
        call = editor.call_module(
            f"{MIXERS}.{site.index}", query, key, value, *needed, clock.mask, clock.positions, *states, origin=old
        )
        output = editor.call(operator.getitem, call, 0, origin=old)
        new = [editor.call(operator.getitem, call, 1 + i) for i in range(len(states))]
    editor.replace(old, output)
    for tensor, node in zip(mixer.state(), new, strict=True):
        nodes[f"{tensor.name}@{site.index}"] = node
    return new


def _needed(site: Site, need: str, nodes: dict[str, fx.Node]) -> fx.Node:
    """The node of what a mixer needs: of its own site, or ("key@3") the cache of another after this call."""
    own, _, other = need.partition("@")
    return nodes[f"{CACHES[own]}@{other}"] if other else nodes[getattr(site.nodes, need)]


def _return(editor: Editor, new_state: list[fx.Node]) -> None:
    output = next(node for node in editor.graph.nodes if node.op == "output")
    output.args = ((output.args[0], *new_state),)


def _stateless(program: Program) -> str:
    """Why the graph cannot run step by step ('' if it can): an attention that stayed as it was sees only its call."""
    if not program.refused:
        return ""
    first = program.refused[0]
    return f"site {first.index} ({first.module}) was left as it is: {first.reason}"
