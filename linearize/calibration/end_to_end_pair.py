"""Teacher and student side by side, as far as distillation needs them: hidden states, mixer outputs, the head.

A tap is a value that both compute: the input of each attention's block (where it was recovered), the attention's output
[B,H,T,dv], and the hidden states [B,T,D] that logits are made of. Both run whole sequences without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn

from linearize.calibration.chunked_kl import After, Head
from linearize.errors import RewriteError
from linearize.mixers import Mixer
from linearize.mixers.delay_line import DelayLine
from linearize.program import MASK, MIXERS, POSITIONS, TOKENS, Program, StateTensor
from linearize.rewriting.taps import tapped
from linearize.rewriting.walk import attribute, is_op, parameter

aten = torch.ops.aten
ENTRYWISE = (
    aten.mul, aten.div, aten.tanh, aten._to_copy, aten.to, aten.clone, aten.alias, aten.detach, aten.contiguous,
)  # fmt: skip


class Side:
    """One of the two: `values(ids)` gives [hidden states, *taps]."""

    def __init__(self, program: Program, taps: list[str]) -> None:
        self.program = program
        node, self._after = head_of(program)
        self._head = node.args
        self._module = tapped(program.module, [str(node.args[0]), *taps])
        self._inputs = [found for found in self._module.graph.nodes if found.op == "placeholder"]

    @property
    def head_names(self) -> set[str]:
        return {str(arg.target) for arg in self._head[1:3] if isinstance(arg, fx.Node)}

    def head(self) -> Head:
        names = [str(arg.target) for arg in self._head[1:3] if isinstance(arg, fx.Node)]
        weight, *bias = (parameter(self.program.module, name) for name in names)
        return Head(weight, bias[0] if bias else None, self._after)

    def values(self, ids: Tensor) -> list[Tensor]:
        """On int64 [B, T], from an empty state."""
        return list(self._module(*starting_values(self.program, self._inputs, ids)))


def starting_values(program: Program, inputs: Sequence[fx.Node], ids: Tensor) -> list[Tensor]:
    """What placeholders are given for whole sequences int64 [B, T] without padding, from an empty state."""
    states = current_states(program)
    made = {
        TOKENS: ids,
        MASK: torch.ones_like(ids),
        POSITIONS: torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous(),
    }
    named = {str(node.target): node for node in inputs}
    return [
        made[name] if name in made else (states.get(name) or node.meta["state"]).zeros(len(ids), ids.device)
        for name, node in named.items()
    ]


@dataclass
class Pair:
    """Both sides with the same taps, in the same order."""

    teacher: Side
    student: Side

    @staticmethod
    def of(teacher: Program, student: Program) -> Pair:
        """
        Raises:
            RewriteError: the logits are no linear map of hidden states.
        """
        taps = Pair.taps(teacher, student)
        return Pair(Side(teacher, [theirs for theirs, _ in taps]), Side(student, [ours for _, ours in taps]))

    @staticmethod
    def taps(teacher: Program, student: Program) -> list[tuple[str, str]]:
        """Names of the nodes that both sides compute: (teacher's, student's)."""
        known = student.nodes_by_name()
        found: list[tuple[str, str]] = []
        for site in teacher.matched:
            hidden = site.nodes.hidden
            if hidden is not None and hidden in known and site is not teacher.matched[0]:
                found.append((hidden, hidden))
            output = mixer_output(student, site.index)
            if output is not None:
                found.append((site.nodes.core, output))
        return found

    def values(self, ids: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(student's, teacher's): [hidden states, *taps]; gradients go through the student's."""
        with torch.no_grad():
            expected = self.teacher.values(ids)
        return self.student.values(ids), expected

    @contextmanager
    def shared_out(self, shard: bool) -> Iterator[dict[nn.Parameter, nn.Parameter]]:
        """What stands for a parameter while it is trained, where that is not the parameter itself."""
        yield {}

    def heads(self) -> tuple[Head, Head]:
        return self.student.head(), self.teacher.head()


def mixer_output(student: Program, site: int) -> str | None:
    """The name of the node that is the mixer's output; None where nothing reads it."""
    for node in student.graph.nodes:
        if node.op == "call_module" and node.target == f"{MIXERS}.{site}":
            return next((user.name for user in node.users if user.args[1] == 0), None)
    return None


def head_of(program: Program) -> tuple[fx.Node, After | None]:
    """The linear layer that makes the logits, and what follows it, entry by entry.

    Raises:
        RewriteError: something else stands between hidden states and logits.
    """
    output = next(node for node in program.graph.nodes if node.op == "output")
    node = output.args[0][0] if isinstance(output.args[0], tuple | list) else output.args[0]
    behind: list[fx.Node] = []
    while is_op(node, *ENTRYWISE) and len(node.all_input_nodes) == 1:
        behind.insert(0, node)
        node = node.all_input_nodes[0]
    reads = [arg for arg in node.args[1:3] if arg is not None] if is_op(node, aten.linear) else []
    if not reads or any(not isinstance(arg, fx.Node) or arg.op != "get_attr" for arg in reads):
        raise RewriteError(
            f"{program.model_name} cannot be distilled: its logits come from {node.format_node() or node}, not from a "
            "linear layer over hidden states; leave the end-to-end stage out"
        )
    return node, (lambda x: _replay(behind, x)) if behind else None


def _replay(nodes: list[fx.Node], x: Tensor) -> Tensor:
    for node in nodes:
        source = node.all_input_nodes[0]
        args = tuple(x if arg is source else arg for arg in node.args)
        x = node.target(*args, **node.kwargs)  # type: ignore[operator]
    return x


def mixers_in(program: Program) -> dict[int, Mixer]:
    return {site.index: attribute(program.module, f"{MIXERS}.{site.index}") for site in program.matched}


def current_states(program: Program) -> dict[str, StateTensor]:
    """The mixers' states by the names of the graph's inputs, at the sizes that they have now (`cut_windows`)."""
    if not hasattr(program.module, MIXERS):
        return {}
    return {
        f"layers_{index}_{tensor.name}": tensor
        for index, mixer in mixers_in(program).items()
        for tensor in mixer.state()
    }


def windows_beside(mixer: Mixer) -> list[DelayLine]:
    """The windows that have a far field beside them."""
    return [line for line in mixer.modules() if isinstance(line, DelayLine)] if mixer.fits else []


def has_window(mixer: Mixer) -> bool:
    return bool(windows_beside(mixer))


@contextmanager
def cut_windows(program: Program) -> Iterator[None]:
    """Every window beside a far field holds one token, so that the far field answers for all before it."""
    lines = [line for mixer in mixers_in(program).values() for line in windows_beside(mixer)]
    before = [line.window for line in lines]
    for line in lines:
        line.window = 1
    try:
        yield
    finally:
        for line, window in zip(lines, before, strict=True):
            line.window = window


@contextmanager
def training_only(parameters: list[nn.Parameter], *modules: nn.Module) -> Iterator[None]:
    """Gradients reach `parameters` alone, whatever else asks for them: the source's weights are shared."""
    everything = {id(p): p for module in modules for p in module.parameters()} | {id(p): p for p in parameters}
    before = {key: p.requires_grad for key, p in everything.items()}
    chosen = {id(p) for p in parameters}
    for key, one in everything.items():
        one.requires_grad_(key in chosen)
    try:
        yield
    finally:
        for key, one in everything.items():
            one.requires_grad_(before[key])
