"""Where positions come from: tables, parameters, buffers, and ways that no state can continue."""
# mypy: ignore-errors

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.plain_models.attentions import BoolMaskOnTheFly, FloatMaskBuffer
from tests.plain_models.base import BLOCK, WIDTH, Decoder, LearnedPositions


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
