"""Whole models: config-driven ones, tutorials, odd outputs and shared blocks."""
# mypy: ignore-errors

import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.plain_models.attentions import FusedSDPA
from tests.plain_models.base import BLOCK, HEADS, LAYERS, MLP, VOCAB, WIDTH, Block, Decoder, LearnedPositions


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
