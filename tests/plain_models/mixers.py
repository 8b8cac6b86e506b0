"""Token mixers that are no attention, alone in a block or beside one."""
# mypy: ignore-errors

import torch
import torch.nn as nn
import torch.nn.functional as F

from tests.plain_models.attentions import FusedSDPA
from tests.plain_models.base import BLOCK, WIDTH, Block, LearnedPositions, Projected


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


class Mixed(LearnedPositions):
    """A block with another mixer, then one with attention (a hybrid model)."""

    def __init__(self, mixer):
        super().__init__(mixer)
        self.blocks.append(Block(FusedSDPA()))
