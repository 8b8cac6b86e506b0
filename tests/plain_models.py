"""Small decoder-only language models written the way people write them, none of them knowing of this project.

Each class shows one style of spelling attention, positions or outputs. All take int64 [B, T] and give logits [B, T, V],
bare or wrapped. Repetition between them is the point: nobody's model is factored like somebody else's.
"""
# mypy: ignore-errors

import math
from dataclasses import dataclass
from types import SimpleNamespace

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


# ---- attentions ------------------------------------------------------------------------------------------------------


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


# ---- token mixers that are no attention ------------------------------------------------------------------------------


class ShortConv(nn.Module):
    """A gated causal convolution of width 4, padded on both sides and cut (Mamba, LFM2)."""

    def __init__(self):
        super().__init__()
        self.into, self.out = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.conv = nn.Conv1d(WIDTH, WIDTH, 4, groups=WIDTH, padding=3)

    def forward(self, x):
        a, gate = self.into(x).chunk(2, -1)
        y = self.conv(a.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2)
        return self.out(F.silu(y) * torch.sigmoid(gate))


class MovingAverage(nn.Module):
    """An exponential moving average by a matrix of decays (Mega)."""

    def __init__(self):
        super().__init__()
        self.decay, self.out = nn.Parameter(torch.zeros(WIDTH)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        t = torch.arange(x.shape[1], device=x.device)
        distance = t[:, None] - t[None, :]
        weights = torch.sigmoid(self.decay)[:, None, None] ** distance.clamp(min=0) * (distance >= 0)
        return self.out(torch.einsum("dts,bsd->btd", weights, x))


class CumulativeLinear(Projected):
    """Linear attention by cumulative sums of key-value products."""

    def forward(self, x):
        q, k, v = self.heads(x)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        sums, total = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(2), k.cumsum(2)
        return self.merge(torch.einsum("bhtd,bhtde->bhte", q, sums) / (q * total).sum(-1, keepdim=True))


class LongConv(nn.Module):
    """A convolution as long as the sequence, by the Fourier transform (Hyena)."""

    def __init__(self):
        super().__init__()
        self.filter, self.out = nn.Parameter(torch.randn(WIDTH, BLOCK)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        T = x.shape[1]
        spectrum = torch.fft.rfft(x.transpose(1, 2), n=2 * T) * torch.fft.rfft(self.filter[:, :T], n=2 * T)
        return self.out(torch.fft.irfft(spectrum, n=2 * T)[..., :T].transpose(1, 2))


class RunningMaximum(nn.Module):
    def __init__(self):
        super().__init__()
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x):
        return self.out(x.cummax(1).values)


class Parallel(nn.Module):
    """An attention and a convolution side by side in one block (Falcon-H1)."""

    def __init__(self):
        super().__init__()
        self.attention, self.conv = FusedSDPA(), ShortConv()

    def forward(self, x):
        return self.attention(x) + self.conv(x)


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


# ---- whole models ----------------------------------------------------------------------------------------------------


@dataclass
class GPTConfig:
    block_size: int = BLOCK
    vocab_size: int = VOCAB
    n_layer: int = LAYERS
    n_embd: int = WIDTH


class NanoGPT(nn.Module):
    """Config-driven, wte/wpe/h/ln_f in a ModuleDict, tied head, returns (logits, loss); logits of all positions."""

    def __init__(self, config=None, last_only=False):
        super().__init__()
        self.config, self.last_only = config or GPTConfig(), last_only
        self.transformer = nn.ModuleDict(
            dict(
                wte=nn.Embedding(self.config.vocab_size, self.config.n_embd),
                wpe=nn.Embedding(self.config.block_size, self.config.n_embd),
                drop=nn.Dropout(0.1),
                h=nn.ModuleList([Block(FusedSDPA()) for _ in range(self.config.n_layer)]),
                ln_f=nn.LayerNorm(self.config.n_embd),
            )
        )
        self.lm_head = nn.Linear(self.config.n_embd, self.config.vocab_size, bias=False)
        self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx, targets=None):
        _, t = idx.size()
        assert t <= self.config.block_size, f"Cannot forward sequence of length {t}"
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = self.transformer.drop(self.transformer.wte(idx) + self.transformer.wpe(pos))
        for block in self.transformer.h:
            x = block(x)
        x = self.transformer.ln_f(x)
        if targets is not None:
            logits = self.lm_head(x)
            loss = F.cross_entropy(logits.view(-1, logits.size(-1)), targets.view(-1), ignore_index=-1)
        else:
            logits = self.lm_head(x[:, [-1], :] if self.last_only else x)
            loss = None
        return logits, loss


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


class TutorialTransformer(nn.Module):
    """The PyTorch tutorial: nn.TransformerEncoder with a square subsequent mask, sequence first, sinusoids.

    Unless it is told `is_causal`, nn.TransformerEncoder looks at the mask's values to find out.
    """

    def __init__(self, is_causal=None):
        super().__init__()
        self.is_causal = is_causal
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 2 * WIDTH, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, LAYERS, enable_nested_tensor=False)
        self.embedding, self.linear = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
        position = torch.arange(BLOCK).unsqueeze(1)
        div_term = torch.exp(torch.arange(0, WIDTH, 2) * (-math.log(10000.0) / WIDTH))
        pe = torch.zeros(BLOCK, 1, WIDTH)
        pe[:, 0, 0::2], pe[:, 0, 1::2] = torch.sin(position * div_term), torch.cos(position * div_term)
        self.register_buffer("pe", pe)

    def forward(self, src):
        x = self.embedding(src.t()) * math.sqrt(WIDTH)
        x = x + self.pe[: x.size(0)]
        mask = nn.Transformer.generate_square_subsequent_mask(x.size(0), device=x.device)
        return self.linear(self.encoder(x, mask, is_causal=self.is_causal)).transpose(0, 1)


class PositionIdBuffer(Decoder):
    """Positions kept as an int buffer and cut to the length, then embedded (the habit of BERT-era code)."""

    def __init__(self):
        super().__init__(BoolMaskOnTheFly)
        self.pos = nn.Embedding(BLOCK, WIDTH)
        self.register_buffer("position_ids", torch.arange(BLOCK).expand(1, -1), persistent=False)

    def forward(self, tokens):
        x = self.tok(tokens) + self.pos(self.position_ids[:, : tokens.size(1)])
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class PositionParameter(Decoder):
    """A parameter [1, max, D] of positions, cut to the length (vision-transformer habit)."""

    def __init__(self):
        super().__init__(FloatMaskBuffer)
        self.pos_emb = nn.Parameter(torch.randn(1, BLOCK, WIDTH))

    def forward(self, tokens):
        x = self.tok(tokens) + self.pos_emb[:, : tokens.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class CumsumPositions(LearnedPositions):
    """Positions counted by a cumulative sum of ones: no arange and no slice to continue them from."""

    def forward(self, tokens):
        x = self.tok(tokens) + self.pos(torch.ones_like(tokens).cumsum(1) - 1)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ReversedPositions(LearnedPositions):
    """Positions counted from the end: what earlier tokens get changes with every new one."""

    def forward(self, tokens):
        T = tokens.shape[1]
        x = self.tok(tokens) + self.pos(torch.arange(T - 1, -1, -1, device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class TokenShift(Decoder):
    """Mixes every token with the one before it (RWKV's shift): a memory of one token outside the attention."""

    def forward(self, tokens):
        x = self.tok(tokens)
        x = x + F.pad(x, (0, 0, 1, 0))[:, :-1]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Mixed(LearnedPositions):
    """A block with another mixer, then one with attention (a hybrid model)."""

    def __init__(self, mixer):
        super().__init__(mixer)
        self.blocks.append(Block(FusedSDPA()))


class SharedBlock(LearnedPositions):
    """One block run twice (ALBERT, universal transformers)."""

    def __init__(self):
        super().__init__(FusedSDPA)

    def forward(self, tokens):
        x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1], device=tokens.device))
        for _ in range(2):
            x = self.blocks[0](x)
        return self.head(self.norm(x))


class OneHotTokens(Decoder):
    """No embedding lookup: one-hot tokens times a matrix."""

    def forward(self, tokens):
        x = F.one_hot(tokens, VOCAB).to(self.tok.weight.dtype) @ self.tok.weight
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class DictOutput(LearnedPositions):
    def forward(self, tokens):
        return {"loss": None, "logits": super().forward(tokens)}


@dataclass
class Output:
    logits: torch.Tensor
    hidden: torch.Tensor | None = None


class DataclassOutput(LearnedPositions):
    def forward(self, tokens):
        return Output(super().forward(tokens))


class WithConfigObject(LearnedPositions):
    """Carries a `config` that is no transformers config."""

    def __init__(self):
        super().__init__(FusedSDPA)
        self.config = SimpleNamespace(vocab_size=VOCAB, is_encoder_decoder=False, n_heads=HEADS, name_or_path="mine")


class ExpertsWithRouter(LearnedPositions):
    """Dense mixture of experts whose router is a softmax that is no attention."""

    def __init__(self):
        super().__init__(FusedSDPA)
        self.router = nn.Linear(WIDTH, 3)
        self.experts = nn.ModuleList(MLP() for _ in range(3))

    def forward(self, tokens):
        x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        weights = torch.softmax(self.router(x), dim=-1)
        x = x + sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(self.experts))
        return self.head(self.norm(x))


class FrozenHalf(LearnedPositions):
    """Some parameters frozen, left in training mode, with a cache attribute set in forward."""

    def __init__(self):
        super().__init__(FusedSDPA)
        self.tok.weight.requires_grad_(False)
        self.cached_length = None

    def forward(self, tokens):
        if self.cached_length != tokens.shape[1]:
            self.cached_positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.tok(tokens) + self.pos(self.cached_positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class NoLogits(nn.Module):
    """Returns the last hidden state's mean: no language model."""

    def __init__(self):
        super().__init__()
        self.tok = nn.Embedding(VOCAB, WIDTH)

    def forward(self, tokens):
        return self.tok(tokens).mean(1)


class BranchOnValues(Decoder):
    """Control flow on the values of tensors, which no tracing can follow."""

    def forward(self, tokens):
        x = self.tok(tokens)
        if x.sum() > 0:
            x = x * 2
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class BranchOnLength(Decoder):
    """Another function for short inputs: right at the traced length only."""

    def forward(self, tokens):
        x = self.tok(tokens)
        x = x + x.cumsum(1).index_select(1, torch.arange(3, device=x.device)).sum() if x.shape[1] > 2 else x
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))
