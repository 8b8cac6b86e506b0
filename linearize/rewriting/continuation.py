"""Which nodes of a graph with state are continued rightly from piece to piece, found by value, node by node.

The whole graph is run on one probe of `WHOLE` tokens and on its two pieces at once. Every node of a piece gets the
whole run's values as its inputs, cut to the piece; what it makes of them must be the whole run's value, cut to the
piece. A node for which this fails looks at other tokens than its own (a convolution, a scan, a cumulative sum, an
attention that nobody matched); in the first piece only what looks ahead fails. The test is local, so one such node
does not hide the next, and its cost is that of a few runs.

Axes are found by value too: what changes from 26 to 15 to 11 is the time axis, from 2 to 3 the batch.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from linearize.program import MASK, MIXERS, POSITIONS, TOKENS, Program
from linearize.rewriting.walk import attribute, is_op

aten = torch.ops.aten
WHOLE, FIRST, PADDED = 26, 15, 3
THREADED = "insert_mixers"  # the rule whose nodes carry state of their own
RUNS = ("whole", "first", "second", "wide")
FAILED = object()  # what a node gives that does not run on a piece


@dataclass(frozen=True)
class Axes:
    """Where time and batch stand in a node's shape; None where there is none. Only for nodes with one time axis at
    most, of exactly the tokens' length. `shape` is the one at the probe."""

    time: int | None
    batch: int | None
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numbers(self) -> int:
        """Numbers for one token of one row."""
        return math.prod(size for dim, size in enumerate(self.shape) if dim not in (self.time, self.batch))


@dataclass
class Continuation:
    """What was read from one graph. `axes` has the nodes whose time axis can be cut; `right` those of them that are
    continued, `wrong` those that are not, in graph order.

    `varying` nodes depend on the tokens or on their number, `valued` ones on values of the inputs.
    """

    axes: dict[fx.Node, Axes] = field(default_factory=dict)
    right: set[fx.Node] = field(default_factory=set)
    varying: set[fx.Node] = field(default_factory=set)
    valued: set[fx.Node] = field(default_factory=set)
    wrong: list[fx.Node] = field(default_factory=list)

    def renamed(self, nodes: dict[str, fx.Node]) -> Continuation:
        """The same facts of a copy of the graph, whose nodes are `nodes` by name."""
        right, varying, valued = (
            {nodes[node.name] for node in found} for found in (self.right, self.varying, self.valued)
        )
        axes = {nodes[node.name]: found for node, found in self.axes.items()}
        return Continuation(axes, right, varying, valued, [nodes[node.name] for node in self.wrong])

    def register(self, new: fx.Node, like: fx.Node) -> None:
        """`new` stands for `like`, rightly continued."""
        self.axes[new] = self.axes[like]
        self.right.add(new)
        self.varying.add(new)
        if like in self.valued:
            self.valued.add(new)

    def timed(self, node: fx.Node) -> Axes | None:
        """The axes of a node that has a time axis which can be cut, else None."""
        axes = self.axes.get(node)
        return axes if axes is not None and axes.time is not None else None


def probe_lengths(program: Program) -> tuple[int, int]:
    """(tokens of the whole probe, of its first piece), within the source's learned positions."""
    whole = min(WHOLE, program.max_positions or WHOLE)
    return whole, max(1, min(FIRST, whole * 3 // 5))


def probe(program: Program, batch: int, length: int, padded: int) -> dict[str, torch.Tensor]:
    """Inputs by name: reproducible token ids; the second row starts with `padded` tokens of padding."""
    device, vocabulary = program.place, program.vocab_size or 2
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (batch, length), generator=generator).to(device)
    mask = torch.ones_like(ids)
    if batch > 1:
        mask[1, :padded] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {TOKENS: ids, MASK: mask, POSITIONS: positions}


def read_continuation(program: Program) -> Continuation:
    """Run the graph whole and in two pieces, see above. Needs weights (no meta device)."""
    whole, first = probe_lengths(program)
    runs = _Lockstep(program, whole, first)
    reading = Continuation()
    with torch.no_grad():
        for node in program.graph.nodes:
            if node.op != "output":
                _read_dependence(node, reading)
                values = runs.values_of(node)
                _judge(node, values, runs, reading)
                runs.keep(node, values)
    return reading


class _Lockstep:
    """The values of four runs, node by node; what no later node reads is let go."""

    def __init__(self, program: Program, whole: int, first: int) -> None:
        self.program, self.whole, self.first = program, whole, first
        inputs = {name: tensor for name, tensor in probe(program, 2, whole, min(PADDED, first - 1)).items()}
        self.inputs = {
            "whole": inputs,
            "first": {name: tensor[:, :first] for name, tensor in inputs.items()},
            "second": {name: tensor[:, first:] for name, tensor in inputs.items()},
            "wide": probe(program, 3, whole, 0),
        }
        self.state = self._state_after_first()
        self.values: dict[str, dict[fx.Node, Any]] = {run: {} for run in RUNS}
        self._last = {arg: node for node in program.graph.nodes for arg in node.all_input_nodes}

    def first_of(self, whole: torch.Tensor, time: int) -> torch.Tensor:
        return whole.narrow(time, 0, self.first)

    def second_of(self, whole: torch.Tensor, time: int) -> torch.Tensor:
        return whole.narrow(time, self.first, self.whole - self.first)

    def _state_after_first(self) -> dict[fx.Node, torch.Tensor]:
        nodes = self.program.placeholders()
        states = [node for node in nodes if "state" in node.meta]
        given = [self._input(node, "first") for node in nodes]
        with torch.no_grad():
            output = self.program.module(*given)
        return dict(zip(states, output[1:], strict=True)) if states else {}

    def _input(self, node: fx.Node, run: str) -> torch.Tensor:
        state = node.meta.get("state")
        if state is None:
            return self.inputs[run][str(node.target)]
        if run == "second":
            return self.state[node]
        return state.zeros(self.inputs[run][TOKENS].shape[0], self.program.device)  # type: ignore[no-any-return]

    def values_of(self, node: fx.Node) -> dict[str, Any]:
        return {run: self._value(node, run) for run in RUNS}

    def _value(self, node: fx.Node, run: str) -> Any:
        if node.op == "placeholder":
            return self._input(node, run)
        if node.op == "get_attr":
            return attribute(self.program.module, str(node.target))
        known = self.values[run]
        if any(known[arg] is FAILED for arg in node.all_input_nodes):
            return FAILED
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: known[arg])
        target: Any = node.target
        if node.op == "call_module":
            target = attribute(self.program.module, str(node.target))
        try:
            return target(*args, **kwargs)
        except (RuntimeError, IndexError, ValueError):
            if run != "second":
                raise
            return FAILED

    def keep(self, node: fx.Node, values: dict[str, Any]) -> None:
        for run, value in values.items():
            self.values[run][node] = value
        for arg in {*node.all_input_nodes, node}:
            if self._last.get(arg, node) is node:
                for run in RUNS:
                    self.values[run].pop(arg, None)


def _read_dependence(node: fx.Node, reading: Continuation) -> None:
    if node.op == "placeholder":
        reading.varying.add(node)
        if node.target != "offset":
            reading.valued.add(node)
        return
    if is_op(node, aten.sym_size):
        if _is_varying_size(node, reading):
            reading.varying.add(node)
        return
    if any(arg in reading.varying for arg in node.all_input_nodes):
        reading.varying.add(node)
    if any(arg in reading.valued for arg in node.all_input_nodes):
        reading.valued.add(node)


def _is_varying_size(node: fx.Node, reading: Continuation) -> bool:
    of, dim = node.args[0], node.args[1]
    assert isinstance(of, fx.Node)
    axes = reading.axes.get(of)
    if axes is None:
        return of in reading.varying
    return axes.time is not None and dim in (axes.time, axes.time - len(axes.shape))


def _judge(node: fx.Node, values: dict[str, Any], runs: _Lockstep, reading: Continuation) -> None:
    """Read the node's axes; compare its pieces with the whole, and put the whole's values in their place."""
    axes = _axes(node, values, runs)
    if axes is None or node not in reading.varying:
        return
    reading.axes[node] = axes
    if axes.time is None:
        return
    if _carries_itself(node):
        if agree(values["second"], runs.second_of(values["whole"], axes.time)):
            reading.right.add(node)
        return
    skipped = min(PADDED, runs.first - 1)  # what stands at padding is nobody's business
    parts = {"first": runs.first_of(values["whole"], axes.time), "second": runs.second_of(values["whole"], axes.time)}
    early = (value.narrow(axes.time, skipped, runs.first - skipped) for value in (values["first"], parts["first"]))
    if agree(values["second"], parts["second"]) and agree(*early):
        reading.right.add(node)
    else:
        reading.wrong.append(node)
    values |= parts


def _axes(node: fx.Node, values: dict[str, Any], runs: _Lockstep) -> Axes | None:
    whole, first, wide = values["whole"], values["first"], values["wide"]
    if not all(isinstance(value, torch.Tensor) for value in (whole, first, wide)):
        return None
    if not whole.ndim == first.ndim == wide.ndim:
        return None
    longer = [dim for dim in range(whole.ndim) if whole.shape[dim] != first.shape[dim]]
    wider = [dim for dim in range(whole.ndim) if whole.shape[dim] != wide.shape[dim]]
    if len(longer) > 1 or len(wider) > 1 or longer == wider != []:
        return None
    time, batch = (found[0] if found else None for found in (longer, wider))
    if time is not None and (whole.shape[time], first.shape[time]) != (runs.whole, runs.first):
        return None
    if batch is not None and (whole.shape[batch], wide.shape[batch]) != (2, 3):
        return None
    if len(_symbolic_dims(node) - {time, batch}):
        return None
    return Axes(time, batch, tuple(whole.shape), whole.dtype)


def _symbolic_dims(node: fx.Node) -> set[int]:
    """Dims that depend on batch or length though the probes show no difference (lengths padded up to a block)."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return set()
    return {dim for dim, size in enumerate(value.shape) if isinstance(size, torch.SymInt)}


def _carries_itself(node: fx.Node) -> bool:
    """Part of what threads state: right in its own way, or made right by the node behind it."""
    if node.op == "placeholder" or node.meta.get("rule") == THREADED or str(node.target).startswith(f"{MIXERS}."):
        return True
    return bool(node.users) and all(user.meta.get("rule") == THREADED for user in node.users)


def agree(actual: Any, expected: torch.Tensor) -> bool:
    """Equal but for rounding."""
    if actual is FAILED or actual.shape != expected.shape or actual.dtype != expected.dtype:
        return False
    if not expected.is_floating_point() and not expected.is_complex():
        return torch.equal(actual, expected)
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    if bool(same.all()):
        return True
    finite = expected[expected.isfinite()].abs()
    largest = finite.amax().item() if finite.numel() else 0.0
    worst = (actual - expected).abs().masked_fill(same, 0.0).amax().item()
    tolerance = max(2e-5, 4 * torch.finfo(expected.dtype).eps)
    return bool(worst <= tolerance * max(largest, 1e-12))


class Recorder(fx.Interpreter):
    """Runs a graph and keeps the values of some nodes in `found`."""

    def __init__(self, module: fx.GraphModule, wanted: Iterable[fx.Node]) -> None:
        super().__init__(module)
        self.wanted = set(wanted)
        self.found: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n in self.wanted:
            self.found[n] = result
        return result


def record(program: Program, wanted: Iterable[fx.Node], length: int) -> dict[fx.Node, Any]:
    """Values of nodes in one run over `length` tokens without padding, batch 2, from an empty state."""
    made = probe(program, 2, length, 0)
    recorder = Recorder(program.module, wanted)
    with torch.no_grad():
        recorder.run(*[
            node.meta["state"].zeros(2, program.device) if "state" in node.meta else made[str(node.target)]
            for node in program.placeholders()
        ])  # fmt: skip
    return recorder.found
