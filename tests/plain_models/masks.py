"""Attentions whose mask is the point: windows, chunks, prefixes, biases, and what is no decoder's mask."""
# mypy: ignore-errors

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.plain_models.base import DIM, HEADS, WIDTH, Projected


class BandedWindow(Projected):
    """A sliding window of 6 keys as a banded boolean mask."""

    def forward(self, x):
        t = torch.arange(x.shape[1], device=x.device)
        distance = t[:, None] - t[None, :]
        mask = (distance >= 0) & (distance < 6)
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask))


class ChunkedLocal(Projected):
    """Causal within chunks of 6."""

    def forward(self, x):
        t = torch.arange(x.shape[1], device=x.device)
        mask = (t[:, None] >= t[None, :]) & (t[:, None] // 6 == t[None, :] // 6)
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask))


class PrefixVisible(Projected):
    """The first 3 keys are seen by all: an instruction prefix."""

    def forward(self, x):
        t = torch.arange(x.shape[1], device=x.device)
        mask = (t[:, None] >= t[None, :]) | (t[None, :] < 3)
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask))


class Strided(Projected):
    """Every second key only, as in sparse transformers."""

    def forward(self, x):
        t = torch.arange(x.shape[1], device=x.device)
        distance = t[:, None] - t[None, :]
        mask = (distance >= 0) & (distance % 2 == 0)
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask))


class Thresholded(Projected):
    """Only keys within 1 of the best one, chosen by the scores themselves."""

    def forward(self, x):
        q, k, v = self.heads(x)
        T = x.shape[1]
        causal = torch.ones(T, T, dtype=torch.bool, device=x.device).tril()
        scores = (q @ k.transpose(-1, -2)).masked_fill(~causal, float("-inf"))
        mask = causal & (scores >= scores.amax(-1, keepdim=True) - 1)
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class AlibiSDPA(Projected):
    """Linear biases as the additive mask of SDPA."""

    def forward(self, x):
        T = x.shape[1]
        slopes = torch.tensor([2.0 ** -(8 * (h + 1) / HEADS) for h in range(HEADS)], device=x.device)
        t = torch.arange(T, device=x.device)
        bias = slopes[:, None, None] * (t[None, :] - t[:, None]).float()
        bias = bias.masked_fill(t[None, :] > t[:, None], float("-inf"))
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=bias))


class AlibiManual(Projected):
    """Linear biases added to the scores by hand."""

    def __init__(self):
        super().__init__()
        self.register_buffer("slopes", torch.tensor([2.0 ** -(8 * (h + 1) / HEADS) for h in range(HEADS)]))

    def forward(self, x):
        q, k, v = self.heads(x)
        t = torch.arange(x.shape[1], device=x.device)
        scores = q @ k.transpose(-1, -2) / math.sqrt(DIM)
        scores = scores - self.slopes[:, None, None] * (t[:, None] - t[None, :]).abs()
        scores = scores.masked_fill(t[None, :] > t[:, None], float("-inf"))
        return self.merge(scores.softmax(-1) @ v)


class Bidirectional(Projected):
    def forward(self, x):
        return self.merge(F.scaled_dot_product_attention(*self.heads(x)))


class MemoryTokens(Projected):
    """Attends to 5 learned memory slots and not to the sequence."""

    def __init__(self):
        super().__init__()
        self.memory = nn.Parameter(torch.randn(5, WIDTH))

    def forward(self, x):
        q, _, _ = self.heads(x)
        _, k, v = self.heads(self.memory.expand(x.shape[0], -1, -1))
        return self.merge(F.scaled_dot_product_attention(q, k, v))


class LinearAttention(Projected):
    """No softmax at all: elu features and cumulative sums."""

    def forward(self, x):
        q, k, v = self.heads(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        scores = (q @ k.transpose(-1, -2)).tril()
        return self.merge(scores @ v / scores.sum(-1, keepdim=True))


class HiddenBias(Projected):
    """A bias of each key computed from its hidden state."""

    def __init__(self):
        super().__init__()
        self.bias = nn.Linear(WIDTH, HEADS)

    def forward(self, x):
        T = x.shape[1]
        bias = self.bias(x).transpose(1, 2).unsqueeze(2)
        bias = bias.masked_fill(torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=bias))
