"""How q, k and v are projected: fused in every order, transposed, adapted, normalised, gated."""
# mypy: ignore-errors

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.plain_models.base import DIM, HEADS, WIDTH, Projected


class Conv1D(nn.Module):
    """GPT-2's: weight (in, out), addmm on flattened tokens."""

    def __init__(self, out, width):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(width, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], -1)


class TransposedWeights(nn.Module):
    def __init__(self):
        super().__init__()
        self.c_attn, self.c_proj = Conv1D(3 * WIDTH, WIDTH), Conv1D(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (z.unflatten(-1, (HEADS, DIM)).transpose(1, 2) for z in self.c_attn(x).split(WIDTH, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.c_proj(y.transpose(1, 2).flatten(2))


class InterleavedByHead(nn.Module):
    """GPT-NeoX and BLOOM: every head's q, k and v side by side."""

    def __init__(self):
        super().__init__()
        self.qkv, self.dense = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = self.qkv(x).view(*x.shape[:2], HEADS, 3 * DIM).transpose(1, 2).chunk(3, dim=-1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.dense(y.transpose(1, 2).flatten(2))


class InterleavedByGroup(nn.Module):
    """lit-gpt: one weight, each group its queries, then its key and its value."""

    def __init__(self, groups=2):
        super().__init__()
        self.groups, self.per_group = groups, HEADS // groups
        self.attn = nn.Linear(WIDTH, (HEADS + 2 * groups) * DIM, bias=True)
        self.proj = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        B, T, C = x.size()
        qkv = self.attn(x).view(B, T, self.groups, self.per_group + 2, DIM).permute(0, 2, 3, 1, 4)
        q, k, v = qkv.split((self.per_group, 1, 1), dim=2)
        k = k.expand(B, self.groups, self.per_group, T, DIM)
        v = v.expand(B, self.groups, self.per_group, T, DIM)
        q, k, v = (z.reshape(B, -1, T, DIM) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=1.0 / DIM**0.5)
        return self.proj(y.transpose(1, 2).reshape(B, T, C))


class ByShard(nn.Module):
    """CodeGen: the weight's rows in two shards, each with its own q, v and k."""

    def __init__(self):
        super().__init__()
        self.qkv_proj, self.out_proj = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x):
        shards = self.qkv_proj(x).reshape(*x.shape[:2], 2, -1)
        q, v, k = torch.split(shards, WIDTH // 2, dim=-1)
        q, k, v = (z.reshape(*x.shape[:2], HEADS, DIM).transpose(1, 2) for z in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(y.transpose(1, 2).reshape(x.shape))


class Adapted(nn.Module):
    """LoRA on q and v: W x + 2 B A x."""

    class Lora(nn.Module):
        def __init__(self, out, rank=3):
            super().__init__()
            self.base = nn.Linear(WIDTH, out)
            self.lora_A, self.lora_B = nn.Linear(WIDTH, rank, bias=False), nn.Linear(rank, out, bias=False)
            self.scaling = 2.0

        def forward(self, x):
            return self.base(x) + self.lora_B(self.lora_A(x)) * self.scaling

    def __init__(self):
        super().__init__()
        self.q_proj, self.v_proj = self.Lora(WIDTH), self.Lora(WIDTH)
        self.k_proj, self.o_proj = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class NormAfterCore(Projected):
    """A norm over the heads' joined outputs before the output projection (Magneto, BitNet)."""

    def __init__(self):
        super().__init__()
        self.sub_norm = nn.RMSNorm(HEADS * DIM)

    def forward(self, x):
        y = F.scaled_dot_product_attention(*self.heads(x), is_causal=True)
        return self.wo(self.sub_norm(y.transpose(1, 2).flatten(2)))
