"""The rotation between two nodes, by value.

With the projections' outputs random and the same for every token of a row, the plain vector u [B,H,T,d] is the same at
every position and the rotated one is q_t = R_t u. R_t is found by least squares over rows and heads. It is a rotary
embedding if it fits, if R_s^T R_t depends on t - s alone, and if it does move something.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from linearize.passes.match.region import Flow, projections_of
from linearize.rewriting.probes import plain_inputs, random_like
from linearize.rewriting.walk import evaluate, shape_of
from linearize.spec import RopeSpec

LENGTH, NEAR = 48, 6  # slow frequencies show at the last position; the first ones tell that distance alone counts
ERRORS = (RuntimeError, ValueError, KeyError, IndexError, TypeError)


def read_rope(flow: Flow, plain: fx.Node, rotated: fx.Node) -> RopeSpec | None:
    """What rotates `plain` [B,H,T,d] into `rotated`, or None: no rotation, or no values to prove it (meta device)."""
    _, heads, _, dim = shape_of(rotated)
    batch = max(2, -(-2 * dim // heads))
    generator = torch.Generator().manual_seed(2)
    given = plain_inputs(flow.program, batch, LENGTH)
    try:
        for source in sorted({*projections_of(flow, plain), *projections_of(flow, rotated)}):
            given[source] = random_like(flow.program, source, batch, LENGTH, generator, same_tokens=True)
        u, q = (value.double() for value in evaluate(flow.program.module, [plain, rotated], given))
    except ERRORS:
        return None
    if u.is_meta or u.shape != q.shape:
        return None
    precise = plain.meta["val"].dtype in (torch.float32, torch.float64)
    return _described(u, q, 1e-4 if precise else 5e-2)


def _described(u: Tensor, q: Tensor, tolerance: float) -> RopeSpec | None:
    if (u - u[:, :, :1]).abs().max() > tolerance * u.abs().max():
        return None
    vectors = u[:, :, 0].flatten(0, 1)
    turned = q[:, :, [*range(NEAR), LENGTH - 1]].movedim(2, 0).flatten(1, 2)
    rotations = torch.linalg.lstsq(vectors.expand(len(turned), -1, -1), turned).solution  # [T, d, d], row vectors
    scale = q.abs().max()
    if not bool((vectors @ rotations - turned).abs().max() <= 10 * tolerance * scale):
        return None
    between = rotations[:NEAR, None] @ rotations[None, :NEAR].transpose(-1, -2)
    if (between[1:, 1:] - between[:-1, :-1]).abs().max() > 10 * tolerance * between.abs().max():
        return None
    return _pairs(rotations, tolerance)


def _pairs(rotations: Tensor, tolerance: float) -> RopeSpec | None:
    """Dims that move, and which of them move together."""
    change = (rotations[1:] - rotations[:1]).abs().amax(0)
    moves = change.amax(0) > 0.2 * tolerance * rotations.abs().max()
    count = int(moves.sum())
    if count == 0:
        return None
    first = int(moves.nonzero()[0])
    partners = change[first].clone()
    partners[first] = 0.0
    other = int(partners.argmax())
    name = {first + 1: "interleaved", first + count // 2: "half"}.get(other, "other")
    return RopeSpec(count, "half" if count == 2 else name)  # type: ignore[arg-type]
