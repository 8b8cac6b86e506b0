"""What `inspect --why` prints of refused attentions, held as golden text."""
# mypy: disable-error-code="misc"

from __future__ import annotations

import inspect
import io
import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from rich.console import Console
from torch import Tensor

import linearize
from linearize.printing import site_details
from linearize.spec import NoMatch
from tests import zoo
from tests.plain_models import Decoder, Projected


def _causal(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


class SparseTopK(Projected):
    """A mask of the three best keys by another product, as sparse indexers make it."""

    def forward(self, x: Tensor) -> Tensor:
        index = (x @ x.transpose(1, 2)).masked_fill(~_causal(x), float("-inf"))
        best = index >= index.topk(1, dim=-1).values
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=(best & _causal(x))[:, None]))


class PooledKeys(Projected):
    """Keys and values of every second token: compressed attention."""

    def forward(self, x: Tensor) -> Tensor:
        q, _, _ = self.heads(x)
        _, k, v = self.heads(x[:, ::2])
        t = torch.arange(x.shape[1], device=x.device)
        mask = t[:, None] >= t[::2][None, :]
        return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))


class PrefixMask(Projected):
    """The first four tokens see each other."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        t = torch.arange(x.shape[1], device=x.device)
        mask = (t[:, None] >= t[None, :]) & ((t[:, None] - t[None, :] < 2) | (t[None, :] < 4))
        scores = (q @ k.transpose(-1, -2) * 0.3).masked_fill(~mask, float("-inf"))
        return self.merge(scores.softmax(-1) @ v)


class TwoSinks(Projected):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = (q @ k.transpose(-1, -2)).masked_fill(~_causal(x), float("-inf"))
        zero = torch.zeros_like(scores[..., :1])
        return self.merge(torch.cat([scores, zero, zero], -1).softmax(-1)[..., :-2] @ v)


class CappedTwice(Projected):
    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = torch.tanh(2 * torch.tanh(q @ k.transpose(-1, -2)))
        return self.merge(scores.masked_fill(~_causal(x), float("-inf")).softmax(-1) @ v)


class ClampedScores(Projected):
    """The operators are those of an attention; only their values tell."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.heads(x)
        scores = (q @ k.transpose(-1, -2) * 0.3).clamp(min=-0.1)
        return self.merge(scores.masked_fill(~_causal(x), float("-inf")).softmax(-1) @ v)


NEAR_MISSES = (SparseTopK, PooledKeys, PrefixMask, TwoSinks, CappedTwice, ClampedScores)


def refused(kind: type[Projected]) -> NoMatch:
    torch.manual_seed(0)
    (site,) = linearize.capture(zoo.loud(Decoder(kind))).sites
    assert isinstance(site, NoMatch)
    return site


def why_text(site: NoMatch) -> str:
    """As it is printed; lines of this file as N, the size of a difference as X, nodes numbered as they appear."""
    stream = io.StringIO()
    Console(file=stream, width=140).print(site_details(site))
    text = re.sub(r"test_why\.py:\d+", "test_why.py:N", stream.getvalue())
    text = re.sub(r"differ from the operator by [\d.]+", "differ from the operator by X", text)
    names = {name: None for name in re.findall(r"(?<!\.)\b[a-z_]+_\d+\b", text)}
    for number, name in enumerate(names):
        text = re.sub(rf"\b{name}\b", f"{name.rsplit('_', 1)[0]}%{number}", text)
    return text


@pytest.mark.parametrize("kind", NEAR_MISSES, ids=[kind.__name__ for kind in NEAR_MISSES])
def test_the_near_miss_as_printed(kind: type[Projected], check_golden: Callable[[str, str], None]) -> None:
    check_golden(f"why_{kind.__name__}", why_text(refused(kind)))


@pytest.mark.parametrize("kind", NEAR_MISSES, ids=[kind.__name__ for kind in NEAR_MISSES])
def test_the_source_line_is_in_the_forward_that_was_refused(kind: type[Projected]) -> None:
    lines, first = inspect.getsourcelines(kind.forward)
    name, number = refused(kind).source.split(":")
    assert name == "test_why.py"
    assert first < int(number) < first + len(lines)
