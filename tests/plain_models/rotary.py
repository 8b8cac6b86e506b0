"""Rotary position embeddings in the layouts in which people write them."""
# mypy: ignore-errors

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.plain_models.base import BLOCK, DIM, HEADS, LAYERS, VOCAB, WIDTH, Block, Projected


class RotaryInForward(Projected):
    """cos and sin made in forward from an arange; halves rotated (GPT-NeoX, Llama in transformers)."""

    def __init__(self, kv_heads=2):
        super().__init__(kv_heads)
        self.register_buffer("inv_freq", 1.0 / 100 ** (torch.arange(0, DIM, 2).float() / DIM), persistent=False)

    @staticmethod
    def rotate_half(x):
        a, b = x.chunk(2, dim=-1)
        return torch.cat((-b, a), dim=-1)

    def forward(self, x):
        q, k, v = self.heads(x)
        angles = torch.outer(torch.arange(x.shape[1], device=x.device).float(), self.inv_freq)
        angles = torch.cat((angles, angles), dim=-1)
        cos, sin = angles.cos(), angles.sin()
        q, k = (z * cos + self.rotate_half(z) * sin for z in (q, k))
        k, v = (z.repeat_interleave(HEADS // self.kv_heads, dim=1) for z in (k, v))
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class RotaryTables(Projected):
    """cos and sin tables cut to the length; even and odd entries rotated by stacking; half of the dims only."""

    def __init__(self):
        super().__init__()
        angles = torch.outer(torch.arange(BLOCK).float(), 1.0 / 100 ** (torch.arange(0, DIM // 2, 2).float() / DIM))
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def rotate(self, x):
        T = x.shape[2]
        turned, kept = x[..., : DIM // 2], x[..., DIM // 2 :]
        even, odd, cos, sin = turned[..., ::2], turned[..., 1::2], self.cos[:T], self.sin[:T]
        turned = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)
        return torch.cat((turned, kept), dim=-1)

    def forward(self, x):
        q, k, v = self.heads(x)
        return self.merge(F.scaled_dot_product_attention(self.rotate(q), self.rotate(k), v, is_causal=True))


class LlamaFromScratch(nn.Module):
    """Meta's reference style: complex freqs_cis cut to the length, repeat_kv by expand, RMSNorm, SwiGLU, -inf triu."""

    class Attention(Projected):
        def __init__(self):
            super().__init__(kv_heads=2)

        def forward(self, x, freqs_cis, mask):
            q, k, v = self.heads(x)
            q, k = (self.rotate(z, freqs_cis) for z in (q, k))
            k, v = (self.repeat_kv(z) for z in (k, v))
            return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))

        @staticmethod
        def rotate(x, freqs_cis):
            z = torch.view_as_complex(x.float().reshape(*x.shape[:-1], -1, 2))
            return torch.view_as_real(z * freqs_cis).flatten(3).type_as(x)

        def repeat_kv(self, x):
            B, G, T, d = x.shape
            return x[:, :, None].expand(B, G, HEADS // G, T, d).reshape(B, HEADS, T, d)

    def __init__(self):
        super().__init__()
        self.tok_embeddings = nn.Embedding(VOCAB, WIDTH)
        self.layers = nn.ModuleList(Block(self.Attention()) for _ in range(LAYERS))
        self.norm, self.output = nn.RMSNorm(WIDTH), nn.Linear(WIDTH, VOCAB, bias=False)
        freqs = 1.0 / 100 ** (torch.arange(0, DIM, 2).float() / DIM)
        angles = torch.outer(torch.arange(BLOCK).float(), freqs)
        self.register_buffer("freqs_cis", torch.polar(torch.ones_like(angles), angles), persistent=False)

    def forward(self, tokens):
        _, seqlen = tokens.shape
        h, freqs_cis = self.tok_embeddings(tokens), self.freqs_cis[:seqlen]
        mask = torch.full((seqlen, seqlen), float("-inf"), device=tokens.device).triu(diagonal=1)
        for layer in self.layers:
            h = layer(h, freqs_cis, mask)
        return self.output(self.norm(h)).float()
