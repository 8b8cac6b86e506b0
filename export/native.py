"""Operators of ours that onnxruntime has itself (domain com.microsoft, version 1), in place of standard operators.

    gla_chunk, gla_vec_chunk   LinearAttention, rule "linear" or "gated", decays by head or by channel
    delta_chunk                LinearAttention, rule "delta" or "gated_delta"
    hybrid_chunk, hybrid_ring  their far field: LinearAttention "linear" for s, and again with a value of one for z
    short_conv                 CausalConvWithState

LinearAttention holds one state a "kv head"; where the gates are by query head, keys and values are repeated. Its T is
not bounded, and it is linear in T. `scale` is given always: its default is 1 / sqrt(K).
What stays standard: window softmax (ring, left padding and sinks are not in GroupQueryAttention's contract), merged
slots (a top-k and a scan), softmax that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearize.ops import OPERATORS, decompositions
from linearize.ops.delta import normalised
from linearize.ops.hybrid import fold_heads, hybrid_chunk_decomposed, soften, window_keys
from linearize.ops.hybrid_ring import over

DOMAIN = "com.microsoft"
LINEAR_ATTENTION, CAUSAL_CONV = f"{DOMAIN}::LinearAttention", f"{DOMAIN}::CausalConvWithState"
STANDARD = "standard operators"

Form = Callable[..., Any]


def gla_native(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, s0: Tensor | None = None,
    *, scale: float = 1.0, chunk: int = 64,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    return linear_attention(q, k, v, s0, g, None, "linear" if g is None else "gated", scale)


def delta_native(
    q: Tensor, k: Tensor, v: Tensor, beta: Tensor, g: Tensor | None = None, s0: Tensor | None = None,
    *, scale: float = 1.0, chunk: int = 32, l2norm: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    q, k = normalised(q, l2norm), normalised(k, l2norm)
    return linear_attention(q, k, v, s0, g, beta, "delta" if g is None else "gated_delta", scale)


def hybrid_native(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, fq: Tensor | None = None, fk: Tensor | None = None,
    *rest: Tensor | None, window: int, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The far field by LinearAttention. The near one in standard operators, of which numerator and denominator are
    wanted apart: as the window's output over values with one more column, which is the sum of the weights."""
    given = [*rest, *([None] * (7 - len(rest)))]
    if fq is None or fk is None:
        return hybrid_chunk_decomposed(q, k, v, mask, fq, fk, *given, window=window, scale=scale)
    mix, sink_k, sink_v, sink_mask, sink_logits, s0, z0 = given
    length = q.shape[1]
    writers = fk * mask[:, :length, None, None].to(fk.dtype)
    values = v[:, :length]
    above, s = linear_attention(fq, writers, values, s0, None, None, "linear", 1.0)
    z0 = None if z0 is None else z0.unsqueeze(-1)
    below, z = linear_attention(fq, writers, torch.ones_like(values[..., :1]), z0, None, None, "linear", 1.0)
    sinks = (mix, sink_k, sink_v, sink_mask, sink_logits)
    near_above, near_below = near_sums(q, k, v, mask, *sinks, window=window, scale=scale)
    total = near_below + below
    return (near_above + above) / total.masked_fill(total == 0, 1.0), s, z.squeeze(-1)


def near_sums(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, mix: Tensor | None, sink_k: Tensor | None, sink_v: Tensor | None,
    sink_mask: Tensor | None, sink_logits: Tensor | None, *, window: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Numerator [B,T,H,dv] and denominator [B,T,H,1] of the window's softmax."""
    batch, length, heads, _ = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    seen = window_keys(length, window, q.device) & mask[:, None]
    if sink_k is not None and sink_v is not None and sink_mask is not None:
        k, v = torch.cat([sink_k, k], dim=1), torch.cat([sink_v, v], dim=1)
        seen = torch.cat([sink_mask, seen], dim=-1)
    scores = (fold_heads(q * scale, kv_heads) @ k.permute(0, 2, 3, 1)).reshape(batch, kv_heads, group, length, -1)
    weights, below = soften(scores.masked_fill(~seen[:, None, None], float("-inf")), sink_logits, mix)
    above = weights.reshape(batch, kv_heads, group * length, -1) @ v.permute(0, 2, 1, 3)
    above = above.reshape(batch, heads, length, v.shape[3])
    return above.transpose(1, 2), below.reshape(batch, heads, length, 1).transpose(1, 2)


def short_conv_native(x: Tensor, state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """CausalConvWithState wants channels before tokens, and its first tap is the oldest token's."""
    batch, length, heads, dim = x.shape
    channels, last = heads * dim, weight.shape[-1] - 1
    taps = weight.flip(-1).reshape(channels, 1, last + 1)
    inputs = [x.reshape(batch, length, channels).transpose(1, 2), taps, None,
              state.reshape(batch, last, channels).transpose(1, 2)]  # fmt: skip
    shapes = [(batch, channels, length), (batch, channels, last)]
    y, new = emit(CAUSAL_CONV, inputs, {"ndim": 1}, shapes)
    return y.transpose(1, 2).reshape(x.shape), new.transpose(1, 2).reshape(state.shape)


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, s0: Tensor | None, g: Tensor | None, beta: Tensor | None, rule: str, scale: float
) -> tuple[Tensor, Tensor]:
    """q [B,T,H,K], k [B,T,G,K], v [B,T,G,V], gates [B,T,Hs] or [B,T,Hs,K], beta [B,T,Hs] -> o [B,T,H,V], s."""
    batch, length, heads, key_dim = q.shape
    given = next((x for x in (g, beta) if x is not None), k)
    states, value_dim = given.shape[2], v.shape[3]
    if states != k.shape[2]:
        k, v = (x.repeat_interleave(states // x.shape[2], dim=2) for x in (k, v))
    packed = [x.reshape(batch, length, x.shape[2] * x.shape[3]) for x in (q, k, v)]
    gates = g.flatten(2) if g is not None and g.ndim == 4 else g
    shapes = [(batch, length, heads * value_dim), (batch, states, key_dim, value_dim)]
    attributes = {"q_num_heads": heads, "kv_num_heads": states, "scale": float(scale), "update_rule": rule}
    o, s = emit(LINEAR_ATTENTION, [*packed, s0, gates, beta], attributes, shapes)
    return o.reshape(batch, length, heads, value_dim), s


def emit(name: str, inputs: list[Tensor | None], attributes: dict[str, Any], shapes: list[Any]) -> list[Tensor]:
    """One node of the ONNX graph with float32 outputs. Only while exporting: run eagerly it would give zeros."""
    while inputs[-1] is None:
        inputs.pop()
    kinds = [torch.float32] * len(shapes)
    return list(torch.onnx.ops.symbolic_multi_out(name, inputs, attributes, dtypes=kinds, shapes=shapes, version=1))


FORMS: dict[str, Form] = {
    "gla_chunk": gla_native,
    "gla_vec_chunk": gla_native,
    "delta_chunk": delta_native,
    "hybrid_chunk": hybrid_native,
    "hybrid_ring": over(hybrid_native),
    "short_conv": short_conv_native,
}
FAR_FIELD = {"hybrid_chunk": 4, "hybrid_ring": 10}  # the argument without which there is none


def native_decompositions() -> dict[torch._ops.OpOverload, Form]:
    """The table for the native flavour: the forms above, and standard operators for the rest."""
    return decompositions() | {OPERATORS[name].overload: form for name, form in FORMS.items()}


def lowering_of(name: str, flavour: str, has_far_field: bool) -> str:
    """In words, what an operator of ours became."""
    hybrid = name in FAR_FIELD
    if flavour != "native" or name not in FORMS or (hybrid and not has_far_field):
        return STANDARD
    native = "CausalConvWithState" if name == "short_conv" else "LinearAttention"
    return f"{DOMAIN}.{native}" + (" beside standard operators" if hybrid else "")
