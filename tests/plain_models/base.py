"""What the models are made of: a block around any attention, and a decoder around the block."""
# mypy: ignore-errors

import torch
import torch.nn as nn
import torch.nn.functional as F

VOCAB, WIDTH, HEADS, DIM, LAYERS, BLOCK = 97, 32, 4, 8, 2, 64


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x):
        return self.down(F.gelu(self.up(x)))


class Block(nn.Module):
    """Pre-norm block around any attention that maps x to x."""

    def __init__(self, attention):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp = attention, MLP()

    def forward(self, x, *extra):
        x = x + self.attn(self.ln_1(x), *extra)
        return x + self.mlp(self.ln_2(x))


class Decoder(nn.Module):
    """Token embedding, one block of a kind of attention, head; positions only if the attention makes them."""

    def __init__(self, attention, **options):
        super().__init__()
        self.tok = nn.Embedding(VOCAB, WIDTH)
        self.blocks = nn.ModuleList([Block(attention(**options))])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens):
        x = self.tok(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class LearnedPositions(Decoder):
    """The same with a table of learned positions, looked up by an arange."""

    def __init__(self, attention, **options):
        super().__init__(attention, **options)
        self.pos = nn.Embedding(BLOCK, WIDTH)

    def forward(self, tokens):
        x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Projected(nn.Module):
    """Separate q, k, v and o; subclasses say what stands between them."""

    def __init__(self, kv_heads=HEADS):
        super().__init__()
        self.kv_heads = kv_heads
        self.wq, self.wo = nn.Linear(WIDTH, HEADS * DIM, bias=False), nn.Linear(HEADS * DIM, WIDTH, bias=False)
        self.wk, self.wv = (nn.Linear(WIDTH, kv_heads * DIM, bias=False) for _ in range(2))

    def heads(self, x):
        B, T, _ = x.shape
        q = self.wq(x).view(B, T, HEADS, DIM).transpose(1, 2)
        k = self.wk(x).view(B, T, self.kv_heads, DIM).transpose(1, 2)
        v = self.wv(x).view(B, T, self.kv_heads, DIM).transpose(1, 2)
        return q, k, v

    def merge(self, y):
        return self.wo(y.transpose(1, 2).reshape(y.shape[0], -1, HEADS * DIM))
