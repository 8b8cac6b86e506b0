"""Ways to spell the attention itself: fused and separate projections, masks, einsums, shared heads."""
# mypy: ignore-errors

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.plain_models.base import BLOCK, DIM, HEADS, WIDTH, Projected


class FusedSDPA(nn.Module):
    """nanoGPT: one c_attn for q, k and v, F.scaled_dot_product_attention(is_causal=True)."""

    def __init__(self, dropout=0.1):
        super().__init__()
        self.c_attn, self.c_proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.dropout, self.resid_dropout = dropout, nn.Dropout(dropout)

    def forward(self, x):
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(WIDTH, dim=2)
        q, k, v = (z.view(B, T, HEADS, C // HEADS).transpose(1, 2) for z in (q, k, v))
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=None, dropout_p=dropout, is_causal=True)
        return self.resid_dropout(self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C)))


class ManualCausal(nn.Module):
    """minGPT: matmul, masked_fill by a buffer of ones, softmax, matmul."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.proj = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.tril(torch.ones(BLOCK, BLOCK)).view(1, 1, BLOCK, BLOCK))

    def forward(self, x):
        B, T, C = x.size()
        k, q, v = (f(x).view(B, T, HEADS, DIM).transpose(1, 2) for f in (self.key, self.query, self.value))
        att = (q @ k.transpose(-2, -1)) * (1.0 / math.sqrt(k.size(-1)))
        att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
        y = F.softmax(att, dim=-1) @ v
        return self.proj(y.transpose(1, 2).contiguous().view(B, T, C))


class EinsumCausal(nn.Module):
    """Einsums over [B, T, H, d], a mask made on the fly, -1e9 instead of infinity."""

    def __init__(self):
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3, HEADS, WIDTH, DIM) / WIDTH**0.5)
        self.out = nn.Parameter(torch.randn(HEADS, DIM, WIDTH) / WIDTH**0.5)

    def forward(self, x):
        q, k, v = (torch.einsum("btc,hcd->bthd", x, weight) for weight in self.qkv)
        scores = torch.einsum("bthd,bshd->bhts", q, k) / DIM**0.5
        causal = torch.triu(torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device), diagonal=1)
        weights = torch.softmax(scores.masked_fill(causal, -1e9), dim=-1)
        return torch.einsum("bhts,bshd,hdc->btc", weights, v, self.out)


class FloatMaskBuffer(Projected):
    """SDPA with an additive mask cut out of a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((BLOCK, BLOCK), float("-inf")).triu(1), persistent=False)

    def forward(self, x):
        T = x.shape[1]
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=self.mask[:T, :T]))


class BoolMaskOnTheFly(Projected):
    def forward(self, x):
        mask = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask, scale=0.5))


class MultiQuery(Projected):
    """One key and value head, expanded to all query heads."""

    def __init__(self):
        super().__init__(kv_heads=1)

    def forward(self, x):
        q, k, v = self.heads(x)
        k, v = k.expand(-1, HEADS, -1, -1), v.expand(-1, HEADS, -1, -1)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class EnableGQA(Projected):
    def __init__(self):
        super().__init__(kv_heads=2)

    def forward(self, x):
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), is_causal=True, enable_gqa=True))


class RepeatInterleave(Projected):
    def __init__(self):
        super().__init__(kv_heads=2)

    def forward(self, x):
        q, k, v = self.heads(x)
        k, v = (z.repeat_interleave(HEADS // self.kv_heads, dim=1) for z in (k, v))
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class TiledHeads(Projected):
    """Key heads tiled (0 1 0 1), not grouped (0 0 1 1): a matcher that assumes groups is wrong."""

    def __init__(self):
        super().__init__(kv_heads=2)

    def forward(self, x):
        q, k, v = self.heads(x)
        k, v = (z.repeat(1, HEADS // self.kv_heads, 1, 1) for z in (k, v))
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class SoftCapped(Projected):
    """Scores through 3 tanh(s / 3), then masked, as Gemma 2 does."""

    def forward(self, x):
        q, k, v = self.heads(x)
        scores = 3.0 * torch.tanh(q @ k.transpose(-1, -2) * DIM**-0.5 / 3.0)
        causal = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        return self.merge(torch.softmax(scores.masked_fill(~causal, float("-inf")), -1) @ v)


class SinkLogits(Projected):
    """A learned logit in every row's denominator, as gpt-oss has."""

    def __init__(self):
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x):
        q, k, v = self.heads(x)
        T = x.shape[1]
        scores = q @ k.transpose(-1, -2) * DIM**-0.5
        scores = scores.masked_fill(torch.ones(T, T, dtype=torch.bool, device=x.device).triu(1), float("-inf"))
        sinks = self.sinks.view(1, HEADS, 1, 1).expand(x.shape[0], -1, T, -1)
        weights = torch.softmax(torch.cat([scores, sinks], dim=-1), dim=-1)[..., :-1]
        return self.merge(weights @ v)


class GatedOutput(Projected):
    """The attention's output gated by its own input, with q and k normalised by head."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(WIDTH, HEADS * DIM)
        self.q_norm, self.k_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM)

    def forward(self, x):
        q, k, v = self.heads(x)
        y = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v, is_causal=True)
        y = y.transpose(1, 2).reshape(x.shape[0], -1, HEADS * DIM)
        return self.wo(torch.sigmoid(self.gate(x)) * y)


class Differential(Projected):
    """The difference of two softmaxes (differential transformer), both over the same values."""

    def __init__(self):
        super().__init__()
        self.wq2, self.wk2 = (nn.Linear(WIDTH, HEADS * DIM, bias=False) for _ in range(2))
        self.mix = nn.Parameter(torch.tensor(0.4))

    def forward(self, x):
        q, k, v = self.heads(x)
        q2, k2 = (f(x).view(x.shape[0], -1, HEADS, DIM).transpose(1, 2) for f in (self.wq2, self.wk2))
        one = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        two = F.scaled_dot_product_attention(q2, k2, v, is_causal=True)
        return self.merge(one - self.mix * two)


class GatedBySize(Projected):
    """Granite: the output gated by how far the scores' logsumexp is above a learned logit by head."""

    def __init__(self):
        super().__init__()
        self.sinks = nn.Parameter(torch.randn(HEADS))

    def forward(self, x):
        q, k, v = self.heads(x)
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)
        scores = (q @ k.transpose(-1, -2) * DIM**-0.5).masked_fill(hidden, float("-inf"))
        gate = torch.sigmoid(scores.logsumexp(dim=-1) - self.sinks.view(1, -1, 1)).unsqueeze(-1)
        return self.merge(scores.softmax(-1) @ v * gate)
