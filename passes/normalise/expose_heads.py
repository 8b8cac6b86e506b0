"""Nodes that mixers want and the source does not have: keys at kv heads, and queries and keys before their rotation.

    k [B,H,S,d], its G heads repeated in another layout or before the rotation
        -> k' = repeat(u),  u = k[:, ::H/G] or transpose(x) of an x [B,S,G,d]
    q = transpose(rotate(x [B,T,H,d])),  q = cat(x, rotate(y))
        -> u = transpose(x),  u = cat(x, y): q's own computation at position 0, where the rotation is the identity

The first changes what attention reads and is proved by value; the second only adds nodes, kept until mixers take them,
which matching then proves (`passes/match/rotation.py`). Nothing is added where such a node is there already.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import fx

from linearize.passes.match import region
from linearize.passes.match.cores import Core, find_cores
from linearize.passes.normalise.at_position_zero import AtPositionZero
from linearize.passes.normalise.spell_einsums import call
from linearize.pipeline import Keeps, Stage
from linearize.program import Program
from linearize.rewriting.editor import Editor, keep
from linearize.rewriting.probes import plain_inputs, random_like
from linearize.rewriting.walk import MAX_INDEX, evaluate, is_op, shape_of

aten = torch.ops.aten
MOVES = (*region.REPEATS, aten.transpose, aten.permute, aten.squeeze)
ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError)


@dataclass(frozen=True)
class ExposeHeads:
    name: ClassVar[str] = "expose_heads"
    stage: ClassVar[Stage] = Stage.NORMALISE
    keeps: ClassVar[Keeps] = Keeps.EXACT

    def run(self, program: Program) -> Program:
        module = program.copy_graph()
        copied = program.replace(module=module)
        flow = region.read_flow(copied)
        cores = [core for core in find_cores(copied, flow.activations) if isinstance(core, Core)]
        editor = Editor(module, self.name)
        changed = False
        for core in cores:
            if all(len(shape_of(node)) == 4 for node in (core.query, core.key, core.value)):
                changed |= _expose(editor, flow, core)
        return program.replace(module=editor.finish()) if changed else program


def _expose(editor: Editor, flow: region.Flow, core: Core) -> bool:
    changed = False
    key = core.key
    for node in dict.fromkeys((core.key, core.value)):
        found = region.before_repeat(flow, node, _heads(core))
        if found is node and node in flow.activations:
            found = _unrepeated(editor, flow, node, _heads(core))
            changed |= found is not node
        key = found if node is core.key else key
    for node in (core.query, key):
        changed |= _keep_unrotated(editor, flow, node)
    return changed


def _heads(core: Core) -> int:
    return int(shape_of(core.query)[1])


def _unrepeated(editor: Editor, flow: region.Flow, node: fx.Node, heads: int) -> fx.Node:
    """A new node of `node`'s heads without repetition, from which `node`'s users now read; `node` where it has none."""
    times = _repetition(flow, node)
    if times == 1 or shape_of(node)[1] != heads:
        return node
    with editor.graph.inserting_after(node):
        users = list(node.users)
        bare = _source_at_kv_heads(editor, flow, node, heads // times)
        if bare is None:
            bare = call(editor, node, aten.slice.Tensor, node, 1, 0, MAX_INDEX, times)
    with editor.graph.inserting_after(bare):
        apart = call(editor, node, aten.unsqueeze.default, bare, 2)
    with editor.graph.inserting_after(apart):
        wide = call(editor, node, aten.expand.default, apart, [-1, -1, times, -1, -1])
    with editor.graph.inserting_after(wide):
        joined = call(editor, node, aten.flatten.using_ints, wide, 1, 2)
    for user in users:
        user.replace_input_with(node, joined)
    flow.activations.update((bare, apart, wide, joined))
    return bare


def _repetition(flow: region.Flow, node: fx.Node) -> int:
    """How often each head of `node` [B,H,S,d] stands side by side, by value from random projections; 1 if unproved."""
    sources = region.projections_of(flow, node)
    generator = torch.Generator().manual_seed(3)
    given = plain_inputs(flow.program, 2, 5)
    try:
        given |= {source: random_like(flow.program, source, 2, 5, generator) for source in sources}
        (value,) = evaluate(flow.program.module, [node], given)
    except ERRORS:
        return 1
    if value.is_meta or value.ndim != 4:
        return 1
    heads = value.shape[1]
    for times in range(heads, 1, -1):
        if heads % times == 0 and torch.equal(value, value[:, ::times].repeat_interleave(times, dim=1)):
            return times
    return 1


def _source_at_kv_heads(editor: Editor, flow: region.Flow, node: fx.Node, groups: int) -> fx.Node | None:
    """transpose(x) for an x [B,S,G,d] of which `node` is the repetition."""
    _, heads, length, dim = shape_of(node)
    current = node
    while is_op(current, *MOVES) and isinstance(current.args[0], fx.Node):
        current = current.args[0]
        shape = shape_of(current)
        if len(shape) == 4 and str(shape[1]) == str(length) and tuple(shape[2:]) == (groups, dim):
            probe = torch.randn(2, 7, groups, dim, generator=torch.Generator().manual_seed(0))
            given: dict[fx.Node, Any] = {**plain_inputs(flow.program, 2, 7), current: probe}
            try:
                (value,) = evaluate(flow.program.module, [node], given)
            except ERRORS:  # a length that tracing fixed
                return None
            if torch.equal(value, probe.transpose(1, 2).repeat_interleave(heads // groups, dim=1)):
                return call(editor, node, aten.transpose.int, current, 1, 2)
    return None


def _keep_unrotated(editor: Editor, flow: region.Flow, node: fx.Node) -> bool:
    """Add what `node` [B,H,T,d] would be without positions, unless a node is that already or none can be made."""
    known = node.name in flow.kept or region.before_rotation(flow, node) is not None
    if node not in flow.activations or known:
        return False
    plain = AtPositionZero(editor, flow, node).value()
    if plain is None or [str(size) for size in shape_of(plain)] != [str(size) for size in shape_of(node)]:
        return False
    keep(plain, node)
    return True
