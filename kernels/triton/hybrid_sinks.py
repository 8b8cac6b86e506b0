"""Sinks and sink logits in the backward of `hybrid_chunk`: few, so PyTorch's own operators differentiate them.

Letters as in `hybrid_backward.py` beside this. Memory is linear in T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


class Sinks:
    """What they add to a, their maximum (log2), and their gradients."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        mask: Tensor | None,
        logits: Tensor | None,
        tops: Tensor,
        dn: Tensor,
        dmass: Tensor,
        scale: float,
    ) -> None:
        given, heads = [q, k, v, logits], q.shape[2]
        self.given = given
        # Copies: autograd keeps them, and the kernels are handed the originals.
        self.leaves = [x if x is None else x.detach().to(tops.dtype, copy=True).requires_grad_() for x in given]
        dmass = dmass.clone()
        natural = (tops * math.log(2)).masked_fill(tops == float("-inf"), 0.0)
        maxima = []
        with torch.enable_grad():
            q_leaf, k_leaf, v_leaf, l_leaf = self.leaves
            self.total = torch.zeros_like(tops)
            if q_leaf is not None and k_leaf is not None and v_leaf is not None and mask is not None:
                groups = (k_leaf.shape[2], heads // k_leaf.shape[2])
                scores = torch.einsum("btgrd,bmgd->btgrm", q_leaf.unflatten(2, groups), k_leaf).flatten(2, 3) * scale
                scores = scores.masked_fill(~mask[:, :, None], float("-inf"))
                gain = torch.einsum("btgrv,bmgv->btgrm", dn.unflatten(2, groups), v_leaf).flatten(2, 3)
                gain = gain + dmass[..., None]
                self.total = self.total + (torch.exp(scores - natural[..., None]) * gain).sum(-1)
                maxima.append(scores.amax(-1))
            if l_leaf is not None:
                self.total = self.total + torch.exp(l_leaf - natural[..., None]).sum(-1) * dmass
                maxima.append(l_leaf.amax(-1).expand(tops.shape))
            self.top = maxima[0] if len(maxima) == 1 else torch.maximum(*maxima)

    def gradients(self, mix: Tensor | None, spread: Tensor, chosen: Tensor | None) -> list[Tensor | None]:
        """Gradients of q, sink_k, sink_v and sink_logits, their maxima's among them where `chosen` is -1."""
        share = torch.ones_like(spread[0, 0]) if mix is None else mix.to(spread.dtype)
        with torch.enable_grad():
            objective = (self.total * share).sum()
            if chosen is not None:
                top = self.top.masked_fill((chosen >= 0) | (self.top == float("-inf")), 0.0)
                objective = objective - (share * spread * top).sum()
        wanted = [x for x in self.leaves if x is not None]
        found = iter(torch.autograd.grad(objective, wanted, allow_unused=True))
        grads = [None if x is None else next(found) for x in self.leaves]
        return [
            x if x is None else torch.zeros_like(x) if dx is None else dx if n == 0 else dx.to(x.dtype)
            for n, (x, dx) in enumerate(zip(self.given, grads, strict=True))
        ]
