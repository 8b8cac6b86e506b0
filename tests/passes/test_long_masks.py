"""Windows and chunks far longer than a probe could hold are read by rows, in little memory."""
# mypy: disable-error-code="misc,no-untyped-def"

import pytest
import torch
import torch.nn.functional as F

import linearize
from linearize.passes.match import masks
from linearize.passes.match.rows import evaluate_rows
from linearize.program import Program
from linearize.spec import NoMatch, Site
from tests import plain_models as plain
from tests import zoo


class Long(plain.Projected):
    """A mask made of two conditions on positions, by hand or as SDPA's."""

    def __init__(self, window: int = 0, chunk: int = 0, by_hand: bool = False) -> None:
        super().__init__()
        self.window, self.chunk, self.by_hand = window, chunk, by_hand

    def forward(self, x):
        t = torch.arange(x.shape[1], device=x.device)
        row, column = t[:, None], t[None, :]
        mask = column <= row
        if self.window:
            mask = mask & (row - column < self.window)
        if self.chunk:
            mask = mask & (row // self.chunk == column // self.chunk)
        q, k, v = self.heads(x)
        if not self.by_hand:
            return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=mask))
        scores = (q @ k.transpose(-1, -2) * 0.4).masked_fill(~mask, torch.finfo(q.dtype).min)
        return self.merge(scores.softmax(-1) @ v)


class Packed(plain.Decoder):
    """Position ids that start again hide what came before (packed sequences)."""

    def __init__(self) -> None:
        super().__init__(plain.FusedSDPA)

    def forward(self, input_ids, position_ids=None):
        x = self.tok(input_ids)
        if position_ids is None:
            position_ids = torch.arange(x.shape[1], device=x.device).expand(x.shape[:2])
        attention = self.blocks[0].attn
        q, k, v = (z.unflatten(-1, (4, 8)).transpose(1, 2) for z in attention.c_attn(x).chunk(3, -1))
        number = (position_ids == 0).cumsum(1)
        mask = number[:, :, None] == number[:, None, :]
        mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
        return self.head(self.norm(x + attention.c_proj(y.transpose(1, 2).flatten(2))))


def site_of(*args: int, by_hand: bool = False) -> Site | NoMatch:
    (site,) = linearize.capture(zoo.loud(plain.Decoder(Long, window=args[0], chunk=args[1], by_hand=by_hand))).sites
    return site


@pytest.mark.parametrize(
    ("window", "chunk", "by_hand", "mask"),
    [
        (32768, 0, False, "sliding(32768)"),
        (131072, 0, True, "sliding(131072)"),
        (0, 8192, True, "chunked(8192)"),
        (700, 0, False, "sliding(700)"),
    ],
)
def test_a_long_window_or_chunk_is_read(window: int, chunk: int, by_hand: bool, mask: str) -> None:
    site = site_of(window, chunk, by_hand=by_hand)
    assert isinstance(site, Site), site.reason
    assert str(site.attention.mask) == mask


def test_a_long_window_within_a_longer_chunk_is_told_and_refused() -> None:
    site = site_of(5000, 8192)
    assert isinstance(site, NoMatch)
    assert "the intersection of sliding(5000) and chunked(8192)" in site.reason


def test_no_square_of_a_long_probe_is_ever_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """The largest tensor of a probe at 131072 tokens has as many rows as were chosen."""
    sizes = []

    def watched(*args):
        value = evaluate_rows(*args)
        sizes.append(value.numel())
        return value

    monkeypatch.setattr(masks, "evaluate_rows", watched)
    site_of(131072, 0, by_hand=True)
    assert sizes
    assert max(sizes) <= 2 * 4 * 2 * masks.ROW_BUDGET


def test_rows_equal_the_whole_mask() -> None:
    program: Program = linearize.capture(zoo.loud(plain.Decoder(Long, window=6, chunk=9, by_hand=False)))
    (refused,) = program.refused
    mask = program.node(refused.nodes[-1])
    inputs = masks._inputs(program, 40, packed=False)
    rows = torch.tensor([0, 3, 17, 38])
    whole = masks.evaluate(program.module, [mask], dict(inputs))[0]
    symbol = str(program.placeholders()[0].meta["val"].shape[1])
    assert torch.equal(evaluate_rows(program.module, mask, dict(inputs), rows, 40, symbol), whole[..., rows, :])


def test_sequences_packed_by_position_ids_are_refused() -> None:
    ids = zoo.tokens(2, 13)
    inputs = {"input_ids": ids, "position_ids": torch.arange(13).expand_as(ids).contiguous()}
    (site,) = linearize.capture(zoo.loud(Packed()), inputs).sites
    assert isinstance(site, NoMatch)
    assert "separates sequences packed by position_ids" in site.reason
