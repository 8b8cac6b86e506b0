"""Facts about a site proved by value: the rotation, and that the matched nodes compute the canonical operator."""

from __future__ import annotations

import torch
from torch import fx

from linearize.ops import attention
from linearize.ops.position_bias import position_bias
from linearize.passes.match.cores import Core
from linearize.program import MASK, POSITIONS, TOKENS, Program
from linearize.rewriting.walk import evaluate, shape_of
from linearize.spec import AttentionSpec, RopeSpec

TOLERANCE = 2e-4
LONGEST_VALIDATION = 96


def plain_inputs(program: Program, batch: int, length: int) -> dict[fx.Node, torch.Tensor]:
    """Token ids 0, a mask of ones, positions from 0, on the CPU."""
    ids = torch.zeros(batch, length, dtype=torch.int64)
    made = {TOKENS: ids, MASK: torch.ones_like(ids), POSITIONS: torch.arange(length).expand(batch, length).contiguous()}
    return {node: made[str(node.target)] for node in program.placeholders() if str(node.target) in made}


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


def read_rope(program: Program, source: fx.Node, rotated: fx.Node) -> RopeSpec | None:
    """The rotation between two nodes [B, H, T, d], or None when what lies between is no rotary embedding (it is not
    linear, or q.k would depend on more than the distance), or has no values to prove it (meta device)."""
    _, heads, _, dim = shape_of(source)
    length = 9
    generator = torch.Generator().manual_seed(2)
    dtype = source.meta["val"].dtype
    first, second = (torch.randn(2, heads, 1, dim, generator=generator).to(dtype) for _ in range(2))

    def rotate(vector: torch.Tensor) -> torch.Tensor:
        given: dict[fx.Node, object] = {
            **plain_inputs(program, 2, length),
            source: vector.expand(2, heads, length, dim),
        }
        return evaluate(program.module, [rotated], given)[0].float()

    try:
        one, two, both = rotate(first), rotate(second), rotate(first - 2 * second)
    except (RuntimeError, ValueError, KeyError, TypeError):
        return None
    if one.device.type == "meta" or one.shape != two.shape:
        return None
    tolerance = 1e-4 if dtype in (torch.float32, torch.float64) else 5e-2
    if (both - (one - 2 * two)).abs().max() > tolerance * 10:
        return None
    scores = one @ two.transpose(-1, -2)
    if (scores[..., 1:, 1:] - scores[..., :-1, :-1]).abs().max() > tolerance * scores.abs().max():
        return None
    return _describe_rotation(one, rotate, dim, dtype)


def _describe_rotation(one: torch.Tensor, rotate: object, dim: int, dtype: torch.dtype) -> RopeSpec | None:
    moves = (one[..., 1:, :] - one[..., :1, :]).abs().amax(dim=(0, 1, 2)) > 1e-6
    rotated_dims = int(moves.sum())
    if rotated_dims == 0:
        return None
    first = int(moves.nonzero()[0])
    basis = torch.zeros(2, one.shape[1], 1, dim, dtype=dtype)
    basis[..., first] = 1.0
    partner = rotate(basis)[0, 0, 1].abs()  # type: ignore[operator]
    partner[first] = 0.0
    other = int(partner.argmax())
    pairs = {first + 1: "interleaved", first + rotated_dims // 2: "half"}.get(other, "other")
    if rotated_dims == 2:
        pairs = "half"
    return RopeSpec(rotated_dims, pairs)  # type: ignore[arg-type]
