"""Rotation before the heads are transposed, on a part of the dims, or on keys that are repeated already."""
# mypy: ignore-errors

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.plain_models.base import BLOCK, DIM, HEADS, WIDTH, Projected


def angles(dim, length=BLOCK):
    return torch.outer(torch.arange(length).float(), 1.0 / 100 ** (torch.arange(0, dim, 2).float() / dim))


class ComplexRotary(Projected):
    """Meta's Llama: xq and xk [B, T, H, d] rotated as complex numbers, transposed afterwards."""

    def __init__(self):
        super().__init__(kv_heads=2)
        self.register_buffer("freqs_cis", torch.polar(torch.ones(BLOCK, DIM // 2), angles(DIM)), persistent=False)

    def forward(self, x):
        B, T, _ = x.shape
        xq, xk, xv = (f(x).view(B, T, -1, DIM) for f in (self.wq, self.wk, self.wv))
        freqs = self.freqs_cis[:T].view(1, T, 1, DIM // 2)
        xq, xk = (
            torch.view_as_real(torch.view_as_complex(z.float().reshape(B, T, -1, DIM // 2, 2)) * freqs).flatten(3)
            for z in (xq, xk)
        )
        xk, xv = (z[:, :, :, None, :].expand(B, T, 2, HEADS // 2, DIM).reshape(B, T, HEADS, DIM) for z in (xk, xv))
        xq, xk, xv = (z.transpose(1, 2) for z in (xq, xk, xv))
        return self.merge(F.scaled_dot_product_attention(xq, xk, xv, is_causal=True))


class RotaryBeforeTranspose(Projected):
    """GPT-J: even and odd entries of [B, T, H, d], the first half of the dims."""

    def __init__(self):
        super().__init__()
        self.register_buffer("sin", angles(DIM // 2).sin().repeat_interleave(2, dim=-1))
        self.register_buffer("cos", angles(DIM // 2).cos().repeat_interleave(2, dim=-1))

    def rotate(self, x):
        T, r = x.shape[1], DIM // 2
        turned, kept = x[..., :r], x[..., r:]
        swapped = torch.stack((-turned[..., 1::2], turned[..., ::2]), dim=-1).flatten(-2)
        turned = turned * self.cos[:T][None, :, None] + swapped * self.sin[:T][None, :, None]
        return torch.cat((turned, kept), dim=-1)

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (HEADS, DIM)) for f in (self.wq, self.wk, self.wv))
        q, k, v = self.rotate(q).permute(0, 2, 1, 3), self.rotate(k).permute(0, 2, 1, 3), v.permute(0, 2, 1, 3)
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class SharedRotaryKey(nn.Module):
    """Multi-head latent attention: keys of a low rank, and one rotated key that all heads share."""

    def __init__(self, nope=6, rope=4, rank=10):
        super().__init__()
        self.nope, self.rope, self.rank = nope, rope, rank
        self.q_proj = nn.Linear(WIDTH, HEADS * (nope + rope), bias=False)
        self.kv_a, self.kv_norm = nn.Linear(WIDTH, rank + rope, bias=False), nn.RMSNorm(rank)
        self.kv_b = nn.Linear(rank, HEADS * (nope + DIM), bias=False)
        self.o_proj = nn.Linear(HEADS * DIM, WIDTH, bias=False)
        table = angles(rope).repeat(1, 2)
        self.register_buffer("cos", table.cos())
        self.register_buffer("sin", table.sin())

    def rotate(self, x):
        T = x.shape[2]
        a, b = x.chunk(2, dim=-1)
        return x * self.cos[:T] + torch.cat((-b, a), dim=-1) * self.sin[:T]

    def forward(self, x):
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, HEADS, -1).transpose(1, 2)
        q_nope, q_rope = q.split([self.nope, self.rope], dim=-1)
        latent, k_rope = self.kv_a(x).split([self.rank, self.rope], dim=-1)
        kv = self.kv_b(self.kv_norm(latent)).view(B, T, HEADS, -1).transpose(1, 2)
        k_nope, v = kv.split([self.nope, DIM], dim=-1)
        k_rope = self.rotate(k_rope.view(B, 1, T, self.rope)).expand(-1, HEADS, -1, -1)
        q, k = torch.cat((q_nope, self.rotate(q_rope)), -1), torch.cat((k_nope, k_rope), -1)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class RepeatThenRotate(Projected):
    """Falcon: keys repeated to all heads before they are rotated."""

    def __init__(self):
        super().__init__(kv_heads=2)
        table = angles(DIM).repeat(1, 2)
        self.register_buffer("cos", table.cos())
        self.register_buffer("sin", table.sin())

    def forward(self, x):
        q, k, v = self.heads(x)
        k, v = (z.repeat_interleave(HEADS // 2, dim=1) for z in (k, v))
        T = x.shape[1]
        q, k = (
            z * self.cos[:T] + torch.cat((-z[..., DIM // 2 :], z[..., : DIM // 2]), -1) * self.sin[:T] for z in (q, k)
        )
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True))


class NormAfterRotary(ComplexRotary):
    """HunYuan: q and k normalised after their rotation. A norm with weights by dim does not commute with it."""

    def __init__(self):
        super().__init__()
        self.q_norm, self.k_norm = nn.RMSNorm(DIM), nn.RMSNorm(DIM, elementwise_affine=False)

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (f(x).view(B, T, -1, DIM) for f in (self.wq, self.wk, self.wv))
        freqs = self.freqs_cis[:T].view(1, T, 1, DIM // 2)
        q, k = (
            torch.view_as_real(torch.view_as_complex(z.reshape(B, T, -1, DIM // 2, 2)) * freqs).flatten(3)
            for z in (q, k)
        )
        q, k, v = (z.transpose(1, 2) for z in (self.q_norm(q), self.k_norm(k), v))
        return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


class PlainNormAfterRotary(NormAfterRotary):
    """Llama 4: the norm has no weights, so it is the same before the rotation."""

    def __init__(self):
        super().__init__()
        self.q_norm = nn.RMSNorm(DIM, elementwise_affine=False)
