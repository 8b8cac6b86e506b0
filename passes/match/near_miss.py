"""A refusal as it is told: the nodes that were walked through as program lines, the stopper, and its source line."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from torch import fx

from linearize.program import node_line, node_scope
from linearize.spec import NoMatch


@dataclass(frozen=True)
class Refusal:
    """An anchor that is no attention we can raise: why, the nodes walked through from the anchor on, and the one that
    stopped the walk (None where a fact about all of them did)."""

    anchor: fx.Node
    reason: str
    chain: tuple[fx.Node, ...] = field(default=())
    stopper: fx.Node | None = None
    is_attention: bool = True


def refused(index: int, refusal: Refusal) -> NoMatch:
    """The refusal without the graph: names and text only."""
    chain = refusal.chain or (refusal.anchor,)
    stopper = refusal.stopper
    written = source_line(stopper) if stopper is not None else ""
    return NoMatch(
        index=index,
        module=node_scope(refusal.anchor) or refusal.anchor.name,
        reason=with_named_sizes(refusal.reason, refusal.anchor.graph),
        nodes=tuple(node.name for node in chain),
        source=written or source_line(refusal.anchor),
        chain=tuple(step_text(node) for node in chain),
        stopped_at=chain.index(stopper) if stopper is not None and stopper in chain else None,
    )


def source_line(node: fx.Node) -> str:
    """`modeling_llama.py:123`, where the module that made this node was running; '' where tracing kept no trace.

    torch.export keeps the frames of modules' forwards only: a function called from one is told as the line of the call.
    Frames of torch's own modules (a Linear's) are passed over.
    """
    frames = re.findall(r'File "([^"]+)", line (\d+)', str(node.meta.get("stack_trace") or ""))
    written = [(file, line) for file, line in frames if "/torch/nn/modules/" not in file] or frames
    return f"{written[-1][0].rsplit('/', 1)[-1]}:{written[-1][1]}" if written else ""


def step_text(node: fx.Node) -> str:
    """The node as a program line, sizes named B and T after the token ids'."""
    return with_named_sizes(node_line(node), node.graph)


def with_named_sizes(text: str, graph: fx.Graph) -> str:
    for symbol, name in _named_sizes(graph).items():
        text = re.sub(rf"\b{symbol}\b", name, text)
    return text


def _named_sizes(graph: fx.Graph) -> dict[str, str]:
    tokens = next((node for node in graph.nodes if node.op == "placeholder"), None)
    shape = getattr(tokens.meta.get("val"), "shape", ()) if tokens is not None else ()
    return {str(size): name for size, name in zip(shape, "BT", strict=False) if not str(size).isdigit()}
