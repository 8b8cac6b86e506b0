"""Blocks that are put together in other ways: parallel, post-norm, sandwiched, shared, relative biases."""
# mypy: ignore-errors

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.plain_models.attentions import FusedSDPA
from tests.plain_models.base import BLOCK, DIM, HEADS, MLP, VOCAB, WIDTH, LearnedPositions, Projected


class ParallelFused(nn.Module):
    """PaLM in lucidrains' spelling: one projection for q, k, v and the gated feed-forward, one norm."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.dims = (WIDTH, DIM, DIM, 2 * WIDTH)
        self.fused = nn.Linear(WIDTH, sum(self.dims), bias=False)
        self.attn_out, self.ff_out = nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        q, k, v, ff = self.fused(self.norm(x)).split(self.dims, dim=-1)
        q = q.unflatten(-1, (HEADS, DIM)).transpose(1, 2) * DIM**-0.5
        sim = torch.einsum("b h i d, b j d -> b h i j", q, k)
        hidden = torch.ones(x.shape[1], x.shape[1], device=x.device, dtype=torch.bool).triu(1)
        attn = sim.masked_fill(hidden, -torch.finfo(sim.dtype).max).softmax(dim=-1)
        out = torch.einsum("b h i j, b j d -> b h i d", attn, v).transpose(1, 2).flatten(2)
        a, b = ff.chunk(2, dim=-1)
        return self.attn_out(out) + self.ff_out(F.silu(b) * a)


class ParallelBlock(nn.Module):
    """GPT-J: attention and MLP of the same normalised input."""

    def __init__(self):
        super().__init__()
        self.ln, self.attn, self.mlp = nn.LayerNorm(WIDTH), FusedSDPA(), MLP()

    def forward(self, x):
        h = self.ln(x)
        return self.attn(h) + self.mlp(h)


class PostNorm(LearnedPositions):
    """The norm after the sum, as in 2017."""

    def __init__(self):
        super().__init__(FusedSDPA)

    def forward(self, tokens):
        x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block.ln_1(x + block.attn(x))
            x = block.ln_2(x + block.mlp(x))
        return self.head(x)


class Sandwich(LearnedPositions):
    """Norms before and after the attention (Gemma 2, CogView)."""

    def __init__(self):
        super().__init__(FusedSDPA)
        self.after = nn.ModuleList([nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)])

    def forward(self, tokens):
        x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = x + self.after[0](block.attn(block.ln_1(x)))
            x = x + self.after[1](block.mlp(block.ln_2(x)))
        return self.head(self.norm(x))


class RelativeBias(Projected):
    """T5: a learned bias by bucketed distance, no scale."""

    def __init__(self, buckets=8, max_distance=20):
        super().__init__()
        self.buckets, self.max_distance = buckets, max_distance
        self.relative_attention_bias = nn.Embedding(buckets, HEADS)

    def forward(self, x):
        q, k, v = self.heads(x)
        t = torch.arange(x.shape[1], device=x.device)
        distance = (t[:, None] - t[None, :]).clamp(min=0)
        exact = self.buckets // 2
        far = exact + (
            torch.log(distance.float().clamp(min=1) / exact)
            / torch.log(torch.tensor(self.max_distance / exact))
            * (self.buckets - exact)
        ).long().clamp(0, self.buckets - exact - 1)
        bias = self.relative_attention_bias(torch.where(distance < exact, distance, far)).permute(2, 0, 1)[None]
        scores = (q @ k.transpose(-1, -2) + bias).masked_fill(t[None, :] > t[:, None], float("-inf"))
        return self.merge(scores.softmax(-1) @ v)


class Course(nn.Module):
    """A first language model: heads as separate modules in a list, concatenated."""

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.key, self.query, self.value = (nn.Linear(WIDTH, DIM, bias=False) for _ in range(3))
            self.register_buffer("tril", torch.tril(torch.ones(BLOCK, BLOCK)))
            self.dropout = nn.Dropout(0.1)

        def forward(self, x):
            T = x.shape[1]
            wei = self.query(x) @ self.key(x).transpose(-2, -1) * DIM**-0.5
            wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
            return self.dropout(F.softmax(wei, dim=-1)) @ self.value(x)

    def __init__(self, heads=2):
        super().__init__()
        self.token_embedding_table, self.position_embedding_table = (
            nn.Embedding(VOCAB, WIDTH),
            nn.Embedding(BLOCK, WIDTH),
        )
        self.heads = nn.ModuleList(self.Head() for _ in range(heads))
        self.proj, self.ffwd = nn.Linear(heads * DIM, WIDTH), MLP()
        self.ln1, self.ln2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCAB)

    def forward(self, idx, targets=None):
        T = idx.shape[1]
        x = self.token_embedding_table(idx) + self.position_embedding_table(torch.arange(T, device=idx.device))
        h = self.ln1(x)
        x = x + self.proj(torch.cat([head(h) for head in self.heads], dim=-1))
        x = x + self.ffwd(self.ln2(x))
        return self.lm_head(x), None
