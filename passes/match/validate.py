"""Proof by value that the matched nodes compute the canonical operator."""

from __future__ import annotations

import torch
from torch import fx

from linearize.ops import attention
from linearize.ops.position_bias import position_bias
from linearize.passes.match.cores import Core
from linearize.program import Program
from linearize.rewriting.probes import plain_inputs
from linearize.rewriting.walk import evaluate
from linearize.spec import AttentionSpec

TOLERANCE = 2e-4
LONGEST_VALIDATION = 96


def core_disagreement(program: Program, core: Core, key: fx.Node, value: fx.Node, spec: AttentionSpec) -> str | None:
    """Why the matched nodes do not compute `linearize::attention` with `spec`, or None when they do."""
    length = 2 * spec.mask.size + 3 if 0 < 2 * spec.mask.size + 3 <= LONGEST_VALIDATION else 23
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, spec.heads, length, spec.head_dim, generator=generator)
    keys = torch.randn(2, spec.kv_heads, length, spec.head_dim, generator=generator)
    values = torch.randn(2, spec.kv_heads, length, spec.value_dim, generator=generator)
    dtype = core.query.meta["val"].dtype
    query, keys, values = (tensor.to(dtype) for tensor in (query, keys, values))
    given: dict[fx.Node, object] = {**plain_inputs(program, 2, length), core.query: query, key: keys, value: values}
    try:
        (actual,) = evaluate(program.module, [core.output], given)
    except (RuntimeError, ValueError, KeyError, TypeError) as error:
        return f"the matched nodes do not run on their own: {str(error).splitlines()[0]}"
    if actual.device.type == "meta":
        return None  # sinks or biases without values: shapes alone were checked
    expected = attention(
        query,
        keys,
        values,
        _bias_of(spec, length),
        None if core.sinks is None else evaluate(program.module, [core.sinks], {})[0],
        scale=spec.scale,
        softcap=spec.softcap,
        causal=spec.mask.kind != "full",
        window=window_of(spec),
    )
    if actual.shape != expected.shape:
        return f"the matched nodes give shape {list(actual.shape)}, the operator {list(expected.shape)}"
    worst = (actual.float() - expected.float()).abs().max().item()
    tolerance = TOLERANCE if dtype in (torch.float32, torch.float64) else 3e-2
    return None if worst <= tolerance else f"the matched nodes differ from the operator by {worst:.2g} on random inputs"


def _bias_of(spec: AttentionSpec, length: int) -> torch.Tensor | None:
    seen = torch.ones(2, length, dtype=torch.bool)
    chunk = spec.mask.size if spec.mask.kind == "chunked" else 0
    slopes = torch.tensor(spec.alibi) if spec.alibi else None
    return position_bias(seen, seen, chunk, slopes, from_first_token=False) if chunk or spec.alibi else None


def window_of(spec: AttentionSpec) -> int:
    """The operator's `window` argument: 0 for none."""
    return spec.mask.size if spec.mask.kind == "sliding" else 0
