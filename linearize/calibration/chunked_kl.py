"""KL(teacher || student) of next-token distributions from hidden states, over chunks of the vocabulary.

    l = after(h W^T + b),  p = softmax(l)          h [N,D], W [V,D], b [V]; `after` acts entry by entry (a soft-cap)
    KL = mean over N of  sum_v p^t_v (l^t_v - l^s_v) - lse(l^t) + lse(l^s)
    dKL / dl^s = (p^s - p^t) / N

No tensor of [N, V] exists: the sums are kept as running ones with their maximum, and the backward pass computes each
chunk's logits again. The peak beside W is two chunks [N, c] and a gradient [N, D] (a plain KL holds [N, V] five times).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

ENTRIES = 1 << 22  # of a chunk of logits [N, c]
After = Callable[[Tensor], Tensor]


class Head(NamedTuple):
    """What makes logits of hidden states: W [V,D], b [V] or None, and what is done to them afterwards or None."""

    weight: Tensor
    bias: Tensor | None = None
    after: After | None = None

    def logits(self, hidden: Tensor, low: int, high: int) -> Tensor:
        """[N, high - low] in float32."""
        bias = None if self.bias is None else self.bias[low:high]
        found = linear(hidden, self.weight[low:high], bias)
        return (found if self.after is None else self.after(found)).float()


def chunked_kl(student: Tensor, teacher: Tensor, head: Head, expected: Head, chunk: int | None = None) -> Tensor:
    """Mean KL in nats a token of hidden states [N,D] under their heads; gradients reach `student` and the weight and
    bias of `head`. `chunk` entries of the vocabulary at a time."""
    size = chunk or max(64, ENTRIES // max(1, student.shape[0]))
    value: Tensor = _ChunkedKL.apply(student, head.weight, head.bias, teacher, head, expected, size)
    return value


class _ChunkedKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, weight: Tensor, bias: Tensor | None, teacher: Tensor, head: Head, expected: Head,
        size: int,
    ) -> Tensor:  # fmt: skip
        ours, theirs = _Sums(student), _Sums(student)
        for low in range(0, weight.shape[0], size):
            high = min(low + size, weight.shape[0])
            l_s, l_t = head.logits(student, low, high), expected.logits(teacher, low, high)
            ours.add(l_s, None)
            theirs.add(l_t, l_t - l_s)
        ctx.save_for_backward(student, teacher, ours.lse(), theirs.lse())
        ctx.heads, ctx.size = (head, expected), size
        return (theirs.mean() - theirs.lse() + ours.lse()).mean()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        student, teacher, lse_s, lse_t = ctx.saved_tensors
        head, expected = ctx.heads
        wants = ctx.needs_input_grad[:3]
        tensors = (student, head.weight, head.bias)
        found = [torch.zeros_like(x) if wanted else None for x, wanted in zip(tensors, wants, strict=True)]
        for low in range(0, head.weight.shape[0], ctx.size):
            high = min(low + ctx.size, head.weight.shape[0])
            p_t = (expected.logits(teacher, low, high) - lse_t[:, None]).exp_()
            slope = _through(head, student, low, high, lse_s, p_t) * (grads[0] / len(lse_s)).to(student.dtype)
            if found[0] is not None:
                found[0] += slope @ head.weight[low:high]
            if found[1] is not None:
                found[1][low:high] = slope.mT @ student
            if found[2] is not None:
                found[2][low:high] = slope.sum(0)
        return (*found, None, None, None, None)


def _through(head: Head, hidden: Tensor, low: int, high: int, lse: Tensor, p_t: Tensor) -> Tensor:
    """N d KL / d (h W^T + b) [N,c]: p^s - p^t, taken back through what follows the linear layer."""
    if head.after is None:
        return (head.logits(hidden, low, high) - lse[:, None]).exp_().sub_(p_t).to(hidden.dtype)
    with torch.enable_grad():
        leaf = head._replace(after=None).logits(hidden, low, high).to(hidden.dtype).detach().requires_grad_()
        after = head.after(leaf)
    slope = (after.detach().float() - lse[:, None]).exp_().sub_(p_t)
    (back,) = torch.autograd.grad(after, leaf, slope.to(after.dtype))
    return back


class _Sums:
    """Running sum_v e^{l_v - m} and sum_v e^{l_v - m} x_v of N rows, m the largest l so far."""

    def __init__(self, like: Tensor) -> None:
        self.top = like.new_full((like.shape[0],), float("-inf"), dtype=torch.float32)
        self.total, self.weighted = torch.zeros_like(self.top), torch.zeros_like(self.top)

    def add(self, logits: Tensor, values: Tensor | None) -> None:
        top = torch.maximum(self.top, logits.amax(1))
        fade = (self.top - top).exp()
        p = (logits - top[:, None]).exp_()
        self.top, self.total = top, self.total * fade + p.sum(1)
        if values is not None:
            self.weighted = self.weighted * fade + p.mul_(values).sum(1)

    def lse(self) -> Tensor:
        return self.top + self.total.log()

    def mean(self) -> Tensor:
        """sum_v p_v x_v."""
        return self.weighted / self.total
