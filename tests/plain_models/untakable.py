"""Models that cannot be taken, each for one reason."""
# mypy: ignore-errors

import torch
import torch.nn as nn

from tests.plain_models.base import VOCAB, WIDTH, Decoder


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
