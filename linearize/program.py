"""Program: the graph and the history of what was done to it. Passes take one and return another."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from linearize.errors import CaptureError
from linearize.spec import NoMatch, Site
from linearize.weights import ATTACHED, Weights

TOKENS, MASK, POSITIONS = "input_ids", "attention_mask", "position_ids"
MIXERS = "linearize_mixers"
LEAF = "linearize_leaf"
FIXED = "_linearize_fixed"


@dataclass(frozen=True)
class Record:
    """One pass that ran: its name, the program's text after it, its operator counts, and what it took."""

    name: str
    text: str
    op_counts: dict[str, int]
    seconds: float
    note: str = ""


@dataclass(frozen=True)
class Program:
    """A decoder-only language model as a `torch.fx` graph: token ids in, logits [B, T, V] out.

    The graph's placeholders are `input_ids` int64 [B, T], and where the source takes them `attention_mask`
    int64 [B, T] and `position_ids` int64 [B, T]; after `thread_state` also the state tensors. Parameters are the
    source model's own, under the source's names. `padding_moves_positions`: whether the source, given a mask and no
    positions, numbers them from 0 over the padding (most do) or counts a row's real tokens (OPT).
    `fixed_batch` and `fixed_length`: the only sizes the graph is right for, where it was captured with static ones.
    Calls of `call_module` nodes that carry `meta["linearize_leaf"]` are modules of the source that stand opaque in the
    graph, because they cannot be traced (`capture/leaves.py`). `weights`: where a model that stays on disk has them.
    """

    module: fx.GraphModule
    model_name: str
    captured_by: str
    vocab_size: int | None = None
    sites: tuple[Site | NoMatch, ...] = ()
    history: tuple[Record, ...] = ()
    state_names: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    stateless_reason: str = ""
    max_positions: int | None = None
    padding_moves_positions: bool = True
    fixed_batch: int | None = None
    fixed_length: int | None = None
    source_config: dict[str, Any] | None = None
    source_files: dict[str, bytes] = field(default_factory=dict)
    weights: Weights | None = None

    def __post_init__(self) -> None:
        if self.weights is not None:
            setattr(self.module, ATTACHED, self.weights)
        if self.is_static and not hasattr(self.module, FIXED):
            setattr(self.module, FIXED, (self.fixed_batch, self.fixed_length))
            self.module.register_forward_pre_hook(_check_fixed)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def is_static(self) -> bool:
        """Whether it is right for one batch or one length alone."""
        return (self.fixed_batch, self.fixed_length) != (None, None)

    @property
    def leaves(self) -> tuple[str, ...]:
        """Names of the source's modules that stand opaque in the graph."""
        called = [str(node.target) for node in self.graph.nodes if LEAF in node.meta]
        return tuple(dict.fromkeys(called))

    @property
    def matched(self) -> tuple[Site, ...]:
        return tuple(site for site in self.sites if isinstance(site, Site))

    @property
    def refused(self) -> tuple[NoMatch, ...]:
        return tuple(site for site in self.sites if isinstance(site, NoMatch))

    @property
    def device(self) -> torch.device:
        """Where the parameters are (the CPU for a program without any)."""
        tensor = next(iter(self.module.parameters()), None)
        return tensor.device if tensor is not None else torch.device("cpu")

    @property
    def place(self) -> torch.device:
        """Where its values are computed: of a model that stays on disk the parameters are on the meta device, and this
        is where its blocks are read to."""
        return self.weights.device if self.weights is not None else self.device

    @property
    def valueless(self) -> bool:
        """A model on the meta device of which no file holds the weights: only its structure can be asked for."""
        return self.device.type == "meta" and self.weights is None

    def placeholders(self) -> list[fx.Node]:
        return [node for node in self.graph.nodes if node.op == "placeholder"]

    def input_names(self) -> list[str]:
        return [str(node.target) for node in self.placeholders()]

    def node(self, name: str) -> fx.Node:
        for node in self.graph.nodes:
            if node.name == name:
                return node
        raise KeyError(f"no node named {name!r} in the graph of {self.model_name}")

    def nodes_by_name(self) -> dict[str, fx.Node]:
        return {node.name: node for node in self.graph.nodes}

    def copy_graph(self) -> fx.GraphModule:
        """A new GraphModule over the same parameters; editing it leaves this program as it is."""
        graph = fx.Graph()
        mapping: dict[fx.Node, fx.Node] = {}
        output = graph.graph_copy(self.graph, mapping)
        graph.output(output)
        copy = fx.GraphModule(self.module, graph)
        if self.weights is not None:
            setattr(copy, ATTACHED, self.weights)
        return copy

    def replace(self, **changes: Any) -> Program:
        return replace(self, **changes)

    def recorded(self, name: str, started: float, note: str = "") -> Program:
        record = Record(name, program_text(self), dict(op_counts(self.graph)), time.perf_counter() - started, note)
        return replace(self, history=(*self.history, record))


def _check_fixed(module: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
    for dim, (size, what) in enumerate(zip(getattr(module, FIXED), ("batch", "length"), strict=True)):
        if size is not None and inputs[0].shape[dim] != size:
            raise CaptureError(
                f"this program was captured at a static {what} of {size} and is right for no other (got "
                f"{inputs[0].shape[dim]}); its notes say why it could not be captured with a dynamic {what}"
            )


@dataclass(frozen=True)
class StateTensor:
    """One tensor of a recurrent state. `shape` is without the batch dim; `grows` names the dim (of `shape`) whose
    length is the number of tokens seen, for kept softmax layers only."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    grows: int | None = None
    batched: bool = True

    def zeros(self, batch: int, device: torch.device | str = "cpu") -> torch.Tensor:
        shape = (batch, *self.shape) if self.batched else self.shape
        return torch.zeros(shape, dtype=self.dtype, device=device)

    def bytes(self, batch: int, context: int = 0) -> int:
        count = batch if self.batched else 1
        for dim, size in enumerate(self.shape):
            count *= context if dim == self.grows else size
        return count * self.dtype.itemsize


def op_name(node: fx.Node) -> str:
    """`aten.linear` for an operator overload, the module path for a call_module, else the Python name."""
    if isinstance(node.target, torch._ops.OpOverload):
        return f"{node.target.namespace}.{node.target._opname}"
    if isinstance(node.target, str):
        return node.target
    return getattr(node.target, "__name__", str(node.target))


def op_counts(graph: fx.Graph) -> Counter[str]:
    counts: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op == "call_function":
            counts[op_name(node)] += 1
        elif node.op == "call_module":
            counts["leaf" if LEAF in node.meta else "mixer"] += 1
    return counts


def program_text(program: Program) -> str:
    """The program as readable Python-like text, one line a node, with shapes where they are known."""
    lines = [f"def {program.model_name}({', '.join(program.input_names())}):"]
    lines += [f"    {line}" for line in _node_lines(program.graph)]
    return "\n".join(lines)


def _node_lines(graph: fx.Graph) -> Iterator[str]:
    scope = None
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr"):
            continue
        owner = node_scope(node)
        if owner and owner != scope:
            scope = owner
            yield f"# {scope}"
        yield node_line(node)


def node_line(node: fx.Node) -> str:
    """One line of `program_text`: `name = operator(arguments)  # dtype[shape]`."""
    if node.op == "output":
        return f"return {_show(node.args[0])}"
    args = [_show(arg) for arg in node.args] + [f"{k}={_show(v)}" for k, v in node.kwargs.items()]
    shape = _shape_text(node)
    return f"{node.name} = {op_name(node)}({', '.join(args)})" + (f"  # {shape}" if shape else "")


def _show(value: Any) -> str:
    if isinstance(value, fx.Node):
        return str(value.target) if value.op == "get_attr" else value.name
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_show(item) for item in value) + "]"
    return "MAX" if value == 9223372036854775807 else str(value)


def _shape_text(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor):
        kind = str(value.dtype).removeprefix("torch.").replace("float", "f").replace("int", "i")
        return f"{kind}[{', '.join(str(size) for size in value.shape)}]"
    return ""


def node_scope(node: fx.Node) -> str:
    """The innermost module of the source model that this node came from, or ''."""
    if "linearize_scope" in node.meta:
        return str(node.meta["linearize_scope"])
    stack = node.meta.get("nn_module_stack") or {}
    paths = [entry[0] for entry in stack.values()]
    return str(paths[-1]) if paths else ""
