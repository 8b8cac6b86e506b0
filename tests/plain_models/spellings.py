"""The two products and the softmax, in the orders, layouts and operators that people write them in."""
# mypy: ignore-errors

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.plain_models.base import BLOCK, DIM, HEADS, WIDTH, Projected


def causal_mask(x):
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


class HeadsLast(Projected):
    """Scores as [B, T, S, H], softmax over dim 2."""

    def forward(self, x):
        q, k, v = (z.transpose(1, 2) for z in self.heads(x))
        scores = torch.einsum("bthd,bshd->btsh", q, k) / DIM**0.5
        scores = scores.masked_fill(~causal_mask(x)[None, :, :, None], float("-inf"))
        return self.wo(torch.einsum("btsh,bshd->bthd", scores.softmax(2), v).flatten(2))


class KeysFirst(Projected):
    """Scores as [B, H, S, T]: keys times queries, softmax over dim -2, values on the left."""

    def forward(self, x):
        q, k, v = self.heads(x)
        scores = k @ q.transpose(-1, -2) * DIM**-0.5
        scores = scores.masked_fill(~causal_mask(x).T, float("-inf"))
        return self.merge((v.transpose(-1, -2) @ scores.softmax(-2)).transpose(-1, -2))


class MultiQueryEinsum(Projected):
    """PaLM and lucidrains' repositories: one head of keys and values without a dim for it, finfo.min as mask."""

    def __init__(self):
        super().__init__(kv_heads=1)

    def forward(self, x):
        q = self.wq(x).unflatten(-1, (HEADS, DIM)).transpose(1, 2) * DIM**-0.5
        k, v = self.wk(x), self.wv(x)
        sim = torch.einsum("b h i d, b j d -> b h i j", q, k)
        sim = sim.masked_fill(~causal_mask(x), -torch.finfo(sim.dtype).max)
        attn = (sim - sim.amax(dim=-1, keepdim=True).detach()).softmax(dim=-1)
        return self.merge(torch.einsum("b h i j, b j d -> b h i d", attn, v))


class GroupedEinsum(Projected):
    """Grouped queries as a dim of their own: [B, G, R, T, S]."""

    def __init__(self):
        super().__init__(kv_heads=2)

    def forward(self, x):
        q, k, v = self.heads(x)
        q = q.unflatten(1, (2, HEADS // 2))
        scores = torch.einsum("bgrtd,bgsd->bgrts", q, k) / DIM**0.5
        scores = scores.masked_fill(~causal_mask(x), float("-inf"))
        return self.merge(torch.einsum("bgrts,bgsd->bgrtd", scores.softmax(-1), v).flatten(1, 2))


class GroupedMatmul(Projected):
    """The same with broadcast matmuls."""

    def __init__(self):
        super().__init__(kv_heads=2)

    def forward(self, x):
        q, k, v = self.heads(x)
        q, k, v = q.unflatten(1, (2, HEADS // 2)), k.unsqueeze(2), v.unsqueeze(2)
        scores = (q @ k.transpose(-1, -2) / DIM**0.5).masked_fill(~causal_mask(x), float("-inf"))
        return self.merge((scores.softmax(-1) @ v).flatten(1, 2))


class SoftmaxByHand(Projected):
    """exp and sum, the largest score taken off first."""

    def forward(self, x):
        q, k, v = self.heads(x)
        scores = (q @ k.transpose(-1, -2) / DIM**0.5).masked_fill(~causal_mask(x), float("-inf"))
        weights = torch.exp(scores - scores.max(dim=-1, keepdim=True).values)
        return self.merge((weights / weights.sum(dim=-1, keepdim=True)) @ v)


class LogSoftmax(Projected):
    def forward(self, x):
        q, k, v = self.heads(x)
        scores = (q @ k.transpose(-1, -2) / DIM**0.5).masked_fill(~causal_mask(x), float("-inf"))
        return self.merge(F.log_softmax(scores, dim=-1).exp() @ v)


class OneHead(nn.Module):
    """A single head on [B, T, D], no dim for heads (the first attention of most courses)."""

    def __init__(self):
        super().__init__()
        self.key, self.query, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.register_buffer("tril", torch.tril(torch.ones(BLOCK, BLOCK)))

    def forward(self, x):
        _, T, C = x.shape
        wei = self.query(x) @ self.key(x).transpose(-2, -1) * C**-0.5
        wei = wei.masked_fill(self.tril[:T, :T] == 0, float("-inf"))
        return F.softmax(wei, dim=-1) @ self.value(x)


class MergedBatchAndHeads(Projected):
    """bmm over batch times heads, baddbmm with the mask as its summand."""

    def forward(self, x):
        B, T, _ = x.shape
        q, k, v = (z.reshape(B * HEADS, T, DIM) for z in self.heads(x))
        mask = torch.full((T, T), float("-inf"), device=x.device).triu(1).expand(B * HEADS, T, T)
        scores = torch.baddbmm(mask, q, k.transpose(1, 2), alpha=DIM**-0.5)
        return self.merge(torch.bmm(scores.softmax(-1), v).view(B, HEADS, T, DIM))


class HeadsBeforeBatch(Projected):
    """Heads split along the batch: torch.cat(torch.split(q, d, dim=2), dim=0), the habit of early ports."""

    def forward(self, x):
        q, k, v = (torch.cat(torch.split(f(x), DIM, dim=2), dim=0) for f in (self.wq, self.wk, self.wv))
        scores = torch.matmul(q, k.transpose(1, 2)) / math.sqrt(DIM)
        scores = scores.masked_fill(~causal_mask(x), -1e9)
        out = torch.cat(torch.split(torch.bmm(scores.softmax(-1), v), x.shape[0], dim=0), dim=2)
        return self.wo(out)


class TorchMultihead(nn.Module):
    """nn.MultiheadAttention, batch first, with weights or without."""

    def __init__(self, need_weights=False):
        super().__init__()
        self.mha, self.need_weights = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True), need_weights

    def forward(self, x):
        mask = ~causal_mask(x)
        return self.mha(x, x, x, attn_mask=mask, need_weights=self.need_weights)[0]


class FunctionalMultihead(nn.Module):
    """F.multi_head_attention_forward, sequence first, with a float mask."""

    def __init__(self):
        super().__init__()
        self.w_in, self.b_in = nn.Parameter(torch.randn(3 * WIDTH, WIDTH)), nn.Parameter(torch.zeros(3 * WIDTH))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        s = x.transpose(0, 1)
        mask = torch.full((s.shape[0], s.shape[0]), float("-inf"), device=x.device).triu(1)
        y, _ = F.multi_head_attention_forward(
            s, s, s, WIDTH, HEADS, self.w_in, self.b_in, None, None, False, 0.0, self.out.weight, self.out.bias,
            training=False, attn_mask=mask, need_weights=True,
        )  # fmt: skip
        return y.transpose(0, 1)


class MaskThenScale(Projected):
    """CodeGen's order: masked first, divided by a tensor of one number afterwards."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.sqrt(torch.tensor(float(DIM))))

    def forward(self, x):
        q, k, v = self.heads(x)
        scores = torch.where(causal_mask(x), q @ k.transpose(-1, -2), torch.tensor(-1e9, device=x.device))
        return self.merge(F.dropout(F.softmax(scores / self.scale, dim=-1), 0.1, self.training) @ v)


class SoftmaxInFloat32(Projected):
    """The scores cast to float32 for softmax and back, as bfloat16 models do."""

    def forward(self, x):
        q, k, v = self.heads(x)
        scores = q @ k.transpose(-1, -2) / DIM**0.5 + torch.full(
            (x.shape[1], x.shape[1]), torch.finfo(q.dtype).min, dtype=q.dtype, device=x.device
        ).triu(1)
        return self.merge(F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v)


class QueriesInTwoPieces(Projected):
    """The queries' halves attend one after the other, to save memory."""

    def forward(self, x):
        q, k, v = self.heads(x)
        half = x.shape[1] // 2
        mask = causal_mask(x)
        pieces = [
            F.scaled_dot_product_attention(q[:, :, a:b], k, v, attn_mask=mask[a:b])
            for a, b in ((0, half), (half, x.shape[1]))
        ]
        return self.merge(torch.cat(pieces, dim=2))
