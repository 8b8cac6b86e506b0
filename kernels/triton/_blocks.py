"""What the attention kernels share: one block of an online softmax, and a product whose weights may be large."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weigh(weights, values, out, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """out + weights @ values. Weights are not bounded by 1, which float16 does not hold: it goes through tf32."""
    if values.dtype == tl.float16:
        return tl.dot(weights.to(tl.float32), values.to(tl.float32), acc=out, input_precision=PRECISION, out_dtype=ACC)
    return tl.dot(weights.to(values.dtype), values, acc=out, input_precision=PRECISION, out_dtype=ACC)


@triton.jit
def higher(top, scores):
    """The maximum of each row so far: -inf while all its keys were hidden."""
    return tl.maximum(top, tl.max(scores, 1))


@triton.jit
def finite(top):
    """A maximum that can be subtracted."""
    return tl.where(top == float("-inf"), 0.0, top)


@triton.jit
def attend(scores, values, top, mass, out, ACC: tl.constexpr, PRECISION: tl.constexpr):
    """One block of an online softmax: scores in units of log2, -inf where hidden; (top, mass, out) after it."""
    new = higher(top, scores)
    weights = tl.exp2(scores - finite(new)[:, None])
    shrink = tl.exp2(top - finite(new))
    out = weigh(weights, values, out * shrink[:, None], ACC, PRECISION)
    return new, mass * shrink + tl.sum(weights, 1), out


@triton.jit
def add_logit(logit, top, mass, out):
    """A sink logit (log2) joins the denominator: (top, mass, out) after it."""
    new = tl.maximum(top, logit)
    shrink = tl.exp2(top - finite(new))
    return new, mass * shrink + tl.exp2(logit - finite(new)), out * shrink[:, None]
