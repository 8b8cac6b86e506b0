"""Operators of ours that onnxruntime has itself (domain com.microsoft, version 1), in place of standard operators.

    gla_chunk, gla_vec_chunk   LinearAttention, rule "linear" or "gated", decays by head or by channel
    delta_chunk                LinearAttention, rule "delta" or "gated_delta"
    hybrid_ring                its far field: LinearAttention "linear", its window: Attention (`near.py`)
    short_conv                 CausalConvWithState

LinearAttention holds one state a "kv head"; where the gates are by query head, keys and values are repeated. Its T is
not bounded, and it is linear in T. `scale` is given always: its default is 1 / sqrt(K).
What stays standard: window softmax (the standard operator Attention; GroupQueryAttention with an evicting window and a
mask is 1.6 us of 13 faster a token and layer, and a third slower for a piece of 128), merged slots (a top-k and a
scan), softmax that is kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from linearize.export.names import OPSET
from linearize.export.near import far_by_sums, ring_by_attention
from linearize.ops import OPERATORS, decompositions
from linearize.ops.delta import normalised

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


def far_native(
    fq: Tensor, fk: Tensor, v: Tensor, s0: Tensor, z0: Tensor, u: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Sums and states of a far field at once: the values have one more column, of ones."""
    ones = fq.new_ones(fq.shape[0], fq.shape[1], v.shape[2], 1)
    held = torch.cat([s0, z0.unsqueeze(-1)], dim=-1)
    o, s = linear_attention(fq, fk, torch.cat([v, ones], dim=-1), held, None, None, "linear", 1.0)
    above, below = (u * o).split([v.shape[3], 1], dim=-1)
    return above, below, s[..., :-1], s[..., -1:].squeeze(-1)


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
    kinds, version = [torch.float32] * len(shapes), 1 if "::" in name else OPSET
    node = torch.onnx.ops.symbolic_multi_out(name, inputs, attributes, dtypes=kinds, shapes=shapes, version=version)
    return list(node)


FORMS: dict[str, Form] = {
    "gla_chunk": gla_native,
    "gla_vec_chunk": gla_native,
    "delta_chunk": delta_native,
    "hybrid_ring": ring_by_attention(emit, far_native),
    "short_conv": short_conv_native,
}
PORTABLE_FORMS: dict[str, Form] = {"hybrid_ring": ring_by_attention(emit, far_by_sums)}
FAR_FIELD = {"hybrid_ring": 10}  # the argument without which there is none


def native_decompositions() -> dict[torch._ops.OpOverload, Form]:
    """The table for the native flavour: the forms above, and standard operators for the rest."""
    return decompositions() | {OPERATORS[name].overload: form for name, form in FORMS.items()}


def portable_decompositions() -> dict[torch._ops.OpOverload, Form]:
    """The table for the portable flavour: of the operators of the opset, Attention where it fits."""
    return decompositions() | {OPERATORS[name].overload: form for name, form in PORTABLE_FORMS.items()}


def lowering_of(name: str, flavour: str, has_far_field: bool) -> str:
    """In words, what an operator of ours became."""
    hybrid = name in FAR_FIELD
    if flavour != "native" or name not in FORMS or (hybrid and not has_far_field):
        return STANDARD
    native = "CausalConvWithState" if name == "short_conv" else "LinearAttention"
    return f"{DOMAIN}.{native}" + (" beside standard operators" if hybrid else "")
