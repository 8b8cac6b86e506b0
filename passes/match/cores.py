"""Attention cores by anchor and walk: from each SDPA call or softmax back to the query-key product, on to the values.

A core says which nodes are query, key, value, mask and output. What it computes is not read off the operators' order
but checked by value afterwards (`validate.py`): models mask before they scale, cap before they mask, and so on.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import fx

from linearize.passes.match.layout import STRAIGHT, Layout, read_layout
from linearize.passes.match.masks import hidden_source
from linearize.passes.match.near_miss import Refusal
from linearize.program import Program, op_name
from linearize.rewriting.probes import plain_inputs
from linearize.rewriting.walk import cone, evaluate, is_op, shape_of, swaps_last_two, walk_back

aten = torch.ops.aten

SOFTMAXES = (aten.softmax, aten._softmax, aten._safe_softmax)
PRODUCTS = (aten.matmul, aten.bmm, aten.baddbmm)
CASTS = (aten._to_copy, aten.to, aten.clone, aten.dropout, aten.contiguous)
VIEWS = (aten.reshape, aten.view, aten.expand, aten.squeeze, aten.unsqueeze, aten.transpose, aten.permute)
# What may stand between the query-key product and the softmax, with the positions of operands that are not scores.
SCORE_STEPS = (
    aten.mul, aten.div, aten.add, aten.sub, aten.tanh, aten.where, aten.masked_fill, aten.cat, aten.maximum, aten.max,
    aten.clamp, aten.slice, *CASTS, *VIEWS,
)  # fmt: skip


@dataclass(frozen=True)
class Core:
    """One softmax attention: query [.., T, d], key [.., S, d], value [.., S, dv] as the product operators take them.

    `scores` is the node that softmax normalises (less the sinks, a parameter [H] concatenated to it) and `product` the
    query-key product it comes from; both None for an SDPA call, whose mask is `mask` and whose causal flag is `causal`.
    `chain` is what was walked, from the anchor to the product.
    """

    anchor: fx.Node
    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float = 1.0
    softcap: float = 0.0
    mask: fx.Node | None = None
    causal: bool = False
    product: fx.Node | None = None
    scores: fx.Node | None = None
    sinks: fx.Node | None = None
    layout: Layout = STRAIGHT
    chain: tuple[fx.Node, ...] = ()


def find_cores(program: Program, activations: set[fx.Node]) -> Iterator[Core | Refusal]:
    """Every anchor of the graph in order. Softmaxes with no activation-activation product behind them (routers,
    gates) are refused with `is_attention=False`."""
    for node in program.graph.nodes:
        if is_op(node, aten.scaled_dot_product_attention):
            yield _read_sdpa(node)
        elif is_op(node, *SOFTMAXES):
            yield _read_softmax(program, node, activations)
        elif op_name(node).startswith("flex_attention"):
            yield Refusal(
                node, "flex_attention: its score function is code that the graph does not show", (node,), node
            )


def _read_sdpa(node: fx.Node) -> Core | Refusal:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    bound = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value = (bound[name] for name in ("query", "key", "value"))
    if len(shape_of(query)) != 4:
        return Refusal(node, f"SDPA on tensors of rank {len(shape_of(query))}, not [B, H, T, d]", (node, query), query)
    if float(bound.get("dropout_p") or 0.0) > 0.0:
        return Refusal(node, "SDPA with dropout: capture the model in eval mode", (node,), node)
    scale = bound.get("scale")
    return Core(
        anchor=node,
        output=node,
        query=query,
        key=key,
        value=value,
        scale=float(scale) if scale is not None else float(shape_of(query)[-1]) ** -0.5,
        mask=bound.get("attn_mask"),
        causal=bool(bound.get("is_causal", False)),
        chain=(node,),
    )


def _read_softmax(program: Program, node: fx.Node, activations: set[fx.Node]) -> Core | Refusal:
    dim = node.args[1]
    if dim not in (-1, len(shape_of(node)) - 1):
        return Refusal(node, f"softmax over dim {dim}, not the last", (node,), node, is_attention=False)
    chain, product = _walk_to_product(node, activations)
    if product is None:
        return Refusal(node, "no query-key product behind this softmax", tuple(chain), chain[-1], is_attention=False)
    output = _walk_to_values(node)
    if output is None:
        return Refusal(node, "no product with values after this softmax", tuple(chain), node, is_attention=False)
    walked = (*chain, product)
    if is_op(product, aten.bmm, aten.baddbmm) or len(shape_of(product)) != 4:
        return Refusal(node, f"query-key product of rank {len(shape_of(product))}, not [B, H, T, S]", walked, product)
    scores, sinks = _read_sinks(chain, product)
    if isinstance(sinks, str):
        return Refusal(node, sinks, walked, next(step for step in chain if is_op(step, aten.cat)))
    assert scores is not None
    if (foreign := hidden_source(scores, product, activations)) is not None:
        reason = f"the mask or bias {foreign.name} before the softmax depends on the hidden states"
        return Refusal(node, reason, (*walked, foreign), foreign)
    heads = shape_of(product)[1]
    layout = read_layout(program, scores, product, heads) if isinstance(heads, int) else None
    if layout is None:
        return Refusal(node, f"single scores of {product.name} cannot be followed to {scores.name}", walked, scores)
    if (reader := _other_reader(product, output)) is not None:
        return Refusal(
            node, f"its scores are also read by {reader.name} ({op_name(reader)})", (*walked, reader), reader
        )
    scale, softcap, stopped = _read_scalars(program, chain, activations)
    if stopped is not None:
        return Refusal(node, stopped[0], walked, stopped[1])
    return _core(walked, output, layout, scale, softcap, scores, sinks)


def _other_reader(product: fx.Node, output: fx.Node) -> fx.Node | None:
    """What reads scores or weights without being on the way to the output: it would need them kept."""
    behind = cone([output], stop=[product])
    on_chain = {product}
    for node in sorted(behind):
        if any(arg in on_chain for arg in node.all_input_nodes):
            on_chain.add(node)
    users = [user for node in on_chain - {output} for user in node.users]
    return next((user for user in users if user not in behind), None)


def _core(
    chain: tuple[fx.Node, ...], output: fx.Node, layout: Layout, scale: float, softcap: float, scores: fx.Node,
    sinks: fx.Node | None,
) -> Core | Refusal:  # fmt: skip
    node, product = chain[0], chain[-1]
    left, right = product.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return Refusal(node, "query-key product of constants", chain, product, is_attention=False)
    turned_right, right_scale = _unscale(right)
    inner = _untranspose(turned_right)
    if inner is None:
        return Refusal(
            node, f"the product's right operand {right.name} is no transposed tensor", (*chain, right), right
        )
    query, key = (inner, left) if layout.turned else (left, inner)
    query, query_scale = _unscale(query)
    key, key_scale = _unscale(key)
    return Core(
        anchor=node,
        output=output,
        query=query,
        key=key,
        value=output.args[1],  # type: ignore[arg-type]
        scale=scale * query_scale * key_scale * right_scale,
        softcap=softcap,
        product=product,
        scores=scores,
        sinks=sinks,
        layout=layout,
        chain=chain,
    )


def _walk_to_product(node: fx.Node, activations: set[fx.Node]) -> tuple[list[fx.Node], fx.Node | None]:
    """From the softmax back along the operand that carries the scores; the steps in order of walking."""
    chain, current = [node], node.args[0]
    while isinstance(current, fx.Node):
        if is_op(current, *PRODUCTS):
            both = [arg for arg in current.args[:3] if isinstance(arg, fx.Node) and arg in activations]
            return chain, current if len(both) >= 2 else None
        chain.append(current)
        if not is_op(current, *SCORE_STEPS):
            return chain, None
        current = _score_operand(current, activations)
    return chain, None


def _score_operand(node: fx.Node, activations: set[fx.Node]) -> fx.Node | None:
    """The operand that depends on the tokens' embedding: scores do, masks do not. Of several, the one that comes from
    a product: the others are biases made of hidden states."""
    candidates = [arg for arg in node.all_input_nodes if arg in activations]
    if len(candidates) > 1:
        from_product = [arg for arg in candidates if _from_product(arg, activations)]
        candidates = from_product or candidates
    return candidates[0] if candidates else None


def _from_product(node: fx.Node, activations: set[fx.Node]) -> bool:
    while is_op(node, *SCORE_STEPS):
        following = next((arg for arg in node.all_input_nodes if arg in activations), None)
        if following is None:
            return False
        node = following
    return is_op(node, *PRODUCTS) and sum(arg in activations for arg in node.all_input_nodes) >= 2


def _read_sinks(chain: list[fx.Node], product: fx.Node) -> tuple[fx.Node | None, fx.Node | str | None]:
    """(What softmax normalises without its sinks, the parameter [H] that the sinks are); a text in place of the
    parameter where something else is concatenated."""
    joins = [position for position, step in enumerate(chain) if is_op(step, aten.cat)]
    if not joins:
        return chain[0].args[0], None  # type: ignore[return-value]
    parts = chain[joins[0]].args[0]
    following = chain[joins[0] + 1] if joins[0] + 1 < len(chain) else product
    heads = shape_of(product)[1]
    if len(joins) > 1 or len(parts) != 2 or parts[0] is not following:  # type: ignore[arg-type,index]
        return None, "more than the scores and one logit a head are concatenated before the softmax"
    behind = walk_back(parts[1], lambda step: is_op(step, *CASTS, *VIEWS))  # type: ignore[index,arg-type]
    if (
        behind.op != "get_attr"
        or shape_of(behind) != (heads,)
        or shape_of(chain[joins[0]])[-1] != shape_of(product)[-1] + 1
    ):
        return None, f"what is concatenated to the scores is no parameter of one logit a head, but {behind.name}"
    return following, behind


def _walk_to_values(node: fx.Node) -> fx.Node | None:
    """From the softmax forward through casts, views and the cut of a sink to the product whose left operand it is."""
    current = node
    while len(users := list(current.users)) == 1:
        (user,) = users
        if is_op(user, *PRODUCTS) and user.args[0] is current:
            return user
        if not is_op(user, *CASTS, *VIEWS, aten.slice):
            return None
        current = user
    return None


def _untranspose(node: fx.Node) -> fx.Node | None:
    """The key before it was transposed for the product; None where no node is that."""
    bare = walk_back(node, lambda step: is_op(step, *CASTS))
    if swaps_last_two(bare):
        return bare.args[0]  # type: ignore[return-value]
    return None


def _unscale(node: fx.Node) -> tuple[fx.Node, float]:
    """Strip a multiplication by a number from a query or key: it belongs to the scale."""
    if is_op(node, aten.mul, aten.div) and isinstance(node.args[0], fx.Node):
        number = _number(node.args[1])
        if number:
            return node.args[0], number if is_op(node, aten.mul) else 1.0 / number
    return node, 1.0


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _read_scalars(
    program: Program, chain: list[fx.Node], activations: set[fx.Node]
) -> tuple[float, float, tuple[str, fx.Node] | None]:
    """Scale before the soft-cap and the cap itself, from the steps after the product; why and where they could not be
    read. Validation proves them."""
    scale, softcap, capped = 1.0, 0.0, False
    pending = 1.0
    for step in reversed(chain[1:]):
        number = _factor(program, step, activations) if is_op(step, aten.mul, aten.div) else None
        if number is not None:
            pending *= number if is_op(step, aten.mul) else 1.0 / number
        elif is_op(step, aten.tanh):
            if capped:
                return scale, softcap, ("two soft-caps in one chain", step)
            scale, pending, capped = pending, 1.0, True
        elif is_op(step, aten.mul, aten.div) and not _masks_by_product(program, step, activations):
            return scale, softcap, (f"scores scaled by the tensor {step.args[1]}", step)
    if capped:
        softcap = pending
        return scale * softcap, softcap, None
    return pending, 0.0, None


def _factor(program: Program, step: fx.Node, activations: set[fx.Node]) -> float | None:
    """The number that the scores are multiplied or divided by: a literal, or a tensor of one entry that no input
    moves (`math.sqrt` kept as a buffer)."""
    for operand in (step.args[1], step.args[0]):
        if (number := _number(operand)) is not None:
            return number
        if not isinstance(operand, fx.Node) or operand in activations or any(str(n) != "1" for n in shape_of(operand)):
            continue
        if any(node.op == "placeholder" for node in cone([operand])):
            continue
        (value,) = evaluate(program.module, [operand], {})
        if not value.is_meta and value.numel() == 1:
            return float(value)
    return None


def _masks_by_product(program: Program, step: fx.Node, activations: set[fx.Node]) -> bool:
    """Whether the scores are multiplied by a mask of 0 and 1 (GPT-1: w b - 1e4 (1 - b)), which validation proves."""
    factor = next((arg for arg in step.all_input_nodes if arg not in activations), None)
    if factor is None or not is_op(step, aten.mul):
        return False
    try:
        (value,) = evaluate(program.module, [factor], plain_inputs(program, 2, 5))
    except (RuntimeError, ValueError, KeyError, IndexError, TypeError):
        return False
    return not value.is_meta and bool(((value == 0) | (value == 1)).all())
