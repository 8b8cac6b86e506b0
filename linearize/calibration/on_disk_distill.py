"""Distillation of a model that stays on disk: exact gradients through the whole of it, one block in memory at a time.

Forwards both sides run block by block (`end_to_end_chain`), and what crosses the cuts is kept; backwards each block of
the student is read and run again, from the last to the first, and its gradient handed on. So a step reads all weights
twice, whatever its number of tokens, and holds: one block, what crosses all cuts for the tokens of one step, and what
is trained (mixers and adapters) with gradients, Adam's moments and the best values so far.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from linearize.calibration.blocks import Blocks, all_parameters, parameter_bytes, shape_at
from linearize.calibration.checkpoints import Checkpoints
from linearize.calibration.end_to_end_pair import head_of
from linearize.calibration.forecast import MARGIN, SLACK, Forecast, block_seconds
from linearize.calibration.parallel import world
from linearize.distill import Distill
from linearize.errors import RecipeError
from linearize.mixers import Mixer, build_mixer
from linearize.plan import Plan
from linearize.program import MIXERS, Program
from linearize.rewriting.walk import attribute
from linearize.tensorfile import bytes_of, read_tensor

COPIES = 5  # of what is trained: itself, gradient, two moments, the best so far
LOGITS = 128 << 20  # chunks of the vocabulary, of both sides, and their gradient


def check_distill(how: Distill) -> None:
    """
    Raises:
        RecipeError: whole projections are to be trained, which would all have to be in memory.
    """
    if how.tokens and how.full:
        raise RecipeError(
            "of a model that stays on disk adapters are trained, not whole projections: set distill.trainable to "
            '"adapters" in the recipe, or compile it without streaming'
        )


def with_fitted(student: Program, teacher: Program, plan: Plan, kept: Checkpoints) -> Program:
    """The student with mixers that have values: as they were fitted, or as they start where they were not."""
    module = student.copy_graph()
    for site in teacher.matched:
        entry = plan.entry(site.index)
        mixer = build_mixer(entry.mixer, site.attention, entry.options)
        stored = kept.stored(site.index) if entry.mixer != "keep" else {}
        if stored.keys() == mixer.state_dict().keys():
            mixer.load_state_dict({name: read_tensor(one) for name, one in stored.items()})
        setattr(attribute(module, MIXERS), str(site.index), mixer.to(teacher.place))
    return student.replace(module=module)


def tensors_of(trained: Program) -> Callable[[int, str], Tensor]:
    """A tensor of a site's mixer, by the site's number and the tensor's name."""
    mixers: dict[int, Mixer] = {
        site.index: attribute(trained.module, f"{MIXERS}.{site.index}") for site in trained.matched
    }
    return lambda site, name: mixers[site].state_dict()[name]


def with_distillation(
    found: Forecast, teacher: Program, plan: Plan, names: Sequence[str], how: Distill, blocks: Blocks
) -> Forecast:
    """A forecast of fitting, then of this stage, which begins when fitting has given its memory back. `names`: of the
    matrices that get adapters."""
    if not how.tokens:
        return found
    rows, length = -(-how.batch // world()), how.lengths[0]
    cuts = range(1, len(blocks.crossing))
    across = sum(blocks.width(cut, rows, length) for cut in cuts)
    taps = sum(_bytes(teacher, site.nodes.core, rows, length) for site in teacher.matched)
    inside = max(_saved(teacher, blocks, cut, rows, length) for cut in range(len(blocks.crossing)))
    trained = COPIES * _trained_bytes(teacher, plan, names, how)
    largest = max(parameter_bytes(teacher, [name]) for name in all_parameters(teacher))
    needed = found.block + largest + across + 4 * taps + inside + trained + LOGITS
    memory = int(found.taken + needed * MARGIN) + SLACK
    seconds = 2 * block_seconds(teacher, how.tokens)  # six forwards: two, one again, and a way back of twice a forward
    return replace(
        found, memory=max(found.memory, memory), seconds=found.seconds + seconds, disk=found.disk + trained
    )


def _trained_bytes(teacher: Program, plan: Plan, names: Sequence[str], how: Distill) -> int:
    mixers = [build_mixer(plan.entry(s.index).mixer, s.attention, plan.entry(s.index).options) for s in teacher.matched]
    shapes = [teacher.module.get_parameter(name).shape for name in names]
    adapters = sum(4 * how.rank * sum(shape) for shape in shapes)
    return adapters + sum(bytes_of(p.dtype, p.shape) for mixer in mixers for p in mixer.parameters())


def _saved(teacher: Program, blocks: Blocks, cut: int, rows: int, length: int) -> int:
    """All that one block computes, of which autograd keeps most."""
    last: Any = head_of(teacher)[0].args[0]
    return sum(_node_bytes(teacher, node, rows, length) for node in blocks.nodes(cut, last))


def _bytes(program: Program, name: str, rows: int, length: int) -> int:
    return _node_bytes(program, program.node(name), rows, length)


def _node_bytes(program: Program, node: fx.Node, rows: int, length: int) -> int:
    value = node.meta.get("val")
    return bytes_of(value.dtype, shape_at(program, node, rows, length)) if isinstance(value, Tensor) else 0
