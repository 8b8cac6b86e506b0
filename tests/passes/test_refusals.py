"""Every guard of the matcher has an attention that it must not match, and says why."""
# mypy: disable-error-code="misc"

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import linearize
from linearize.errors import CaptureError
from linearize.passes.match.masks import PADDED
from linearize.passes.match.named_masks import MaskReading, Probe
from linearize.passes.match.named_masks import classify as classify_at
from linearize.passes.match.region import owner_name
from linearize.program import Program
from linearize.spec import MaskSpec, NoMatch
from tests import zoo
from tests.plain_models.base import DIM, HEADS, Decoder, Projected

Attend = Callable[[Projected, Tensor], Tensor]


def captured_with(attend: Attend) -> Program:
    """A decoder whose attention is `attend(module with wq, wk, wv, wo, x [B, T, D])`."""

    class Written(Projected):
        def forward(self, x):  # type: ignore[no-untyped-def]
            return attend(self, x)

    torch.manual_seed(0)
    return linearize.capture(zoo.loud(Decoder(Written)))


def causal(x: Tensor) -> Tensor:
    return torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()


def five_dims(self: Projected, x: Tensor) -> Tensor:
    q, k, v = (z.unflatten(1, (2, HEADS // 2)) for z in self.heads(x))
    return self.merge(F.scaled_dot_product_attention(q, k, v, is_causal=True).flatten(1, 2))


def slots(self: Projected, x: Tensor) -> Tensor:
    """Queries, keys and values of 5 slots made from the first token: attention, but not over the sequence."""
    grid = torch.ones(5, 1, device=x.device) * x[:, :1]
    q, k, v = self.heads(grid + torch.arange(5.0, device=x.device)[:, None])
    return self.merge(F.scaled_dot_product_attention(q, k, v)).mean(1, keepdim=True).expand_as(x)


def masks_by_head(self: Projected, x: Tensor) -> Tensor:
    t = torch.arange(x.shape[1], device=x.device)
    distance = t[:, None] - t[None, :]
    reach = torch.tensor([3, 3, 1000, 1000], device=x.device)[:, None, None]
    mask = (distance >= 0) & (distance < reach)
    return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask))


def too_far_window(self: Projected, x: Tensor) -> Tensor:
    t = torch.arange(x.shape[1], device=x.device)
    distance = t[:, None] - t[None, :]
    mask = (distance >= 0) & (distance < 9_000_000)
    return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask))


def window_and_chunk(self: Projected, x: Tensor) -> Tensor:
    t = torch.arange(x.shape[1], device=x.device)
    distance = t[:, None] - t[None, :]
    mask = (distance >= 0) & (distance < 4) & (t[:, None] // 6 == t[None, :] // 6)
    return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask))


def window_and_first_keys(self: Projected, x: Tensor) -> Tensor:
    """A window, and the first two keys always (attention sinks of StreamingLLM)."""
    t = torch.arange(x.shape[1], device=x.device)
    distance = t[:, None] - t[None, :]
    mask = (distance >= 0) & ((distance < 4) | (t[None, :] < 2))
    return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask))


def prefix(self: Projected, x: Tensor) -> Tensor:
    t = torch.arange(x.shape[1], device=x.device)
    mask = (t[None, :] <= t[:, None]) | (t[None, :] < 4)
    return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=mask))


def top_keys(self: Projected, x: Tensor) -> Tensor:
    """Only the keys that an indexer scores highest: causal, and more than that (DeepSeek's sparse attention)."""
    q, k, v = self.heads(x)
    scores = (q.sum(1) @ k.sum(1).transpose(-1, -2)).masked_fill(~causal(x), float("-inf"))
    best = scores.argsort(-1, descending=True).argsort(-1) < 3
    return self.merge(F.scaled_dot_product_attention(q, k, v, attn_mask=(causal(x) & best)[:, None]))


def top_keys_by_hand(self: Projected, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    index = (q.sum(1) @ k.sum(1).transpose(-1, -2)).masked_fill(~causal(x), float("-inf"))
    index = index.argsort(-1, descending=True).argsort(-1) < 3
    scores = (q @ k.transpose(-1, -2)).masked_fill(~(causal(x) & index[:, None]), float("-inf"))
    return self.merge(scores.softmax(-1) @ v)


def bias_from_hidden_states(self: Projected, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    forget = torch.cumsum(F.logsigmoid(x[..., :1]), 1)[:, None]
    scores = q @ k.transpose(-1, -2) + (forget - forget.transpose(-1, -2))
    return self.merge(scores.masked_fill(~causal(x), float("-inf")).softmax(-1) @ v)


def logsumexp_kept(self: Projected, x: Tensor) -> Tensor:
    """The output gated by how large its scores are (Granite's sinks)."""
    q, k, v = self.heads(x)
    scores = (q @ k.transpose(-1, -2)).masked_fill(~causal(x), float("-inf"))
    gate = torch.sigmoid(scores.logsumexp(-1, keepdim=True))
    return self.merge(scores.softmax(-1) @ v * gate)


def halves_of_queries(self: Projected, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    half = x.shape[1] // 2
    y = [
        F.scaled_dot_product_attention(part, k, v, attn_mask=mask)
        for part, mask in ((q[:, :, :half], causal(x)[:half]), (q[:, :, half:], causal(x)[half:]))
    ]
    return self.merge(torch.cat(y, 2))


def mask_from_hidden_states(self: Projected, x: Tensor) -> Tensor:
    quiet = x.detach().mean(-1) > 0
    return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=causal(x) & quiet[:, None, None]))


def relative_bias(self: Projected, x: Tensor) -> Tensor:
    t = torch.arange(x.shape[1], device=x.device)
    bias = -0.3 * (t[:, None] - t[None, :]).float().abs().sqrt()
    bias = bias.masked_fill(~causal(x), float("-inf"))
    return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=bias))


def bias_by_column(self: Projected, x: Tensor) -> Tensor:
    """Linear over the first keys, flat beyond: clipped distances."""
    t = torch.arange(x.shape[1], device=x.device)
    bias = -0.3 * (t[:, None] - t[None, :]).clamp(0, 20).float()
    bias = bias.masked_fill(~causal(x), float("-inf"))
    return self.merge(F.scaled_dot_product_attention(*self.heads(x), attn_mask=bias))


def sink_from_the_query(self: Projected, x: Tensor) -> Tensor:
    """The denominator's extra logit is computed from the query."""
    q, k, v = self.heads(x)
    scores = (q @ k.transpose(-1, -2)).masked_fill(~causal(x), float("-inf"))
    return self.merge(torch.cat([scores, q[..., :1]], -1).softmax(-1)[..., :-1] @ v)


def two_sinks(self: Projected, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    scores = (q @ k.transpose(-1, -2)).masked_fill(~causal(x), float("-inf"))
    zero = torch.zeros_like(scores[..., :1])
    return self.merge(torch.cat([scores, zero, zero], -1).softmax(-1)[..., :-2] @ v)


def dropped_last_key(self: Projected, x: Tensor) -> Tensor:
    """The newest key is cut from the weights, as if it were a sink."""
    q, k, v = self.heads(x)
    weights = (q @ k.transpose(-1, -2)).masked_fill(~causal(x), float("-inf")).softmax(-1)
    return self.merge(weights[..., :-1] @ v[:, :, :-1])


def summed_scores(self: Projected, x: Tensor) -> Tensor:
    """Scores passed through a cumulative sum over the keys (contextual position encoding)."""
    q, k, v = self.heads(x)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(DIM)).masked_fill(~causal(x), 0.0).cumsum(-1)
    return self.merge(scores.masked_fill(~causal(x), float("-inf")).softmax(-1) @ v)


def clamped_scores(self: Projected, x: Tensor) -> Tensor:
    """Scores cut below at -0.1, which the canonical operator does not do."""
    q, k, v = self.heads(x)
    scores = (q @ k.transpose(-1, -2) / math.sqrt(DIM)).clamp(min=-0.1)
    return self.merge(scores.masked_fill(~causal(x), float("-inf")).softmax(-1) @ v)


def scaled_by_position(self: Projected, x: Tensor) -> Tensor:
    """Scores times the logarithm of the query's position (log-n scaling)."""
    q, k, v = self.heads(x)
    growth = torch.log(torch.arange(x.shape[1], device=x.device) + 2.0)[:, None]
    scores = q @ k.transpose(-1, -2) * growth
    return self.merge(scores.masked_fill(~causal(x), float("-inf")).softmax(-1) @ v)


def capped_twice(self: Projected, x: Tensor) -> Tensor:
    q, k, v = self.heads(x)
    scores = torch.tanh(2 * torch.tanh(q @ k.transpose(-1, -2)))
    return self.merge(scores.masked_fill(~causal(x), float("-inf")).softmax(-1) @ v)


REFUSALS: tuple[tuple[Attend, str], ...] = (
    (five_dims, "SDPA on tensors of rank 5, not [B, H, T, d]"),
    (slots, "the query axis has the fixed length 5, not the sequence's"),
    (masks_by_head, "the mask differs between heads"),
    (too_far_window, "has a constant above 2097152, longer than can be probed"),
    (window_and_chunk, "the intersection of sliding(4) and chunked(6)"),
    (window_and_first_keys, "sliding(4) with the first 2 keys always seen"),
    (prefix, "its mask is prefix(4): the first 4 keys are seen by every query"),
    (top_keys, "depends on the hidden states"),
    (top_keys_by_hand, "before the softmax depends on the hidden states"),
    (bias_from_hidden_states, "before the softmax depends on the hidden states"),
    (logsumexp_kept, "its scores are also read by logsumexp"),
    (halves_of_queries, "the queries are a part of the sequence"),
    (mask_from_hidden_states, "depends on the hidden states"),
    (relative_bias, "adds a position-dependent bias to the scores"),
    (bias_by_column, "not linear in the distance (ALiBi)"),
    (sink_from_the_query, "what is concatenated to the scores is no parameter of one logit a head"),
    (two_sinks, "more than the scores and one logit a head are concatenated before the softmax"),
    (dropped_last_key, "values for "),
    (clamped_scores, "the matched nodes differ from the operator by"),
    (scaled_by_position, "scores scaled by the tensor"),
    (capped_twice, "two soft-caps in one chain"),
)


@pytest.mark.parametrize(("attend", "reason"), REFUSALS, ids=[attend.__name__ for attend, _ in REFUSALS])
def test_an_attention_that_must_not_match_says_why(attend: Attend, reason: str) -> None:
    program = captured_with(attend)
    site = program.sites[0]
    assert isinstance(site, NoMatch)
    assert reason in site.reason
    assert site.module == "blocks.0.attn"
    assert site.chain
    assert site.nodes
    assert all(program.node(name) for name in site.nodes)
    assert "test_refusals.py:" in site.source


def test_scores_that_are_summed_over_keys_are_never_taken_for_softmax_attention() -> None:
    program = captured_with(summed_scores)
    assert not program.matched


def test_softmaxes_that_are_no_attention_are_noted_and_left_alone() -> None:
    program = zoo.captured("experts_with_router")
    assert len(program.sites) == 1
    assert any("left alone, no query-key product behind this softmax" in note for note in program.notes)


@pytest.mark.parametrize(
    ("name", "near_miss"),
    [
        ("hunyuan", "rope not recovered: what lies before query or key is not a rotation by value"),
    ],
)
def test_a_fact_that_cannot_be_proved_is_a_near_miss_and_not_claimed(name: str, near_miss: str) -> None:
    site = zoo.captured(name).matched[0]
    assert site.near_misses == (near_miss,)
    assert site.attention.rope is None
    assert site.nodes.query_unrotated is None
    entry = zoo.compiled(name, "lizard{window=4}").plan.entries[0]
    assert entry.mixer == "keep"
    assert near_miss in entry.reason


def test_dropout_that_is_always_on_is_never_silent() -> None:
    def dropping(self: Projected, x: Tensor) -> Tensor:
        return self.merge(F.scaled_dot_product_attention(*self.heads(x), is_causal=True, dropout_p=0.5))

    with pytest.raises(CaptureError, match="differs from the model"):
        captured_with(dropping)


# ---- masks by value --------------------------------------------------------------------------------------------------

T = 20
ROW, COLUMN = torch.arange(T)[:, None], torch.arange(T)[None, :]
CAUSAL = COLUMN <= ROW


def classify(allowed: Tensor, padded: bool) -> MaskReading:
    return classify_at(allowed, Probe(T, torch.arange(T), PADDED), padded)


def hidden_padding(base: Tensor) -> Tensor:
    """[2, 1, T, T]: row 1 of the batch with its first PADDED keys hidden."""
    padded = base.clone()
    padded[:, :PADDED] = False
    return torch.stack([base, padded])[:, None]


@pytest.mark.parametrize(
    ("base", "name"),
    [
        (CAUSAL, "causal"),
        (CAUSAL & (ROW - COLUMN < 4), "sliding(4)"),
        (CAUSAL & (ROW - COLUMN < 1), "sliding(1)"),
        (CAUSAL & (ROW - COLUMN < T), "causal"),
        (CAUSAL & (ROW // 4 == COLUMN // 4), "chunked(4)"),
        (torch.ones(T, T, dtype=torch.bool), "full"),
        (CAUSAL | (COLUMN < 3), "prefix(3)"),
    ],
)
def test_masks_are_named_by_value(base: Tensor, name: str) -> None:
    plain = classify(base[None, None], padded=False)
    assert plain.spec is not None
    assert (str(plain.spec), plain.spec.padding) == (name, False)
    padded = classify(hidden_padding(base), padded=True)
    assert padded.spec is not None
    assert (str(padded.spec), padded.spec.padding) == (name, True)
    unread = classify(base.expand(2, 1, T, T), padded=True)
    assert unread.spec is not None
    assert not unread.spec.padding


@pytest.mark.parametrize(
    ("base", "reason"),
    [
        (CAUSAL | (COLUMN == 3), "unknown mask: at length 20 it shows 3 future keys and hides 0 past ones"),
        (CAUSAL & ((ROW - COLUMN) % 2 == 0), "unknown mask: at length 20 it shows 0 future keys and hides 100"),
        (CAUSAL & ((ROW - COLUMN < 4) | (COLUMN < 1)), "unknown mask"),
        (CAUSAL & (ROW - COLUMN < 4) & (ROW // 8 == COLUMN // 8), "unknown mask"),
        (CAUSAL & ((ROW - COLUMN < 4) | (COLUMN < 2)), "sliding(4) with the first 2 keys always seen"),
        (COLUMN < ROW, "unknown mask"),
        (COLUMN >= ROW, "unknown mask"),
    ],
)
def test_masks_without_a_name_are_described(base: Tensor, reason: str) -> None:
    reading = classify(base[None, None], padded=False)
    assert reading.spec is None or reading.spec.kind == "other"
    assert reason in reading.reason


def test_masks_that_treat_heads_or_padding_in_their_own_way_are_refused() -> None:
    by_head = torch.stack([CAUSAL, CAUSAL & (ROW - COLUMN < 4)])[None]
    assert classify(by_head, padded=False).reason == "the mask differs between heads"
    assert classify(CAUSAL[:, :12][None, None], padded=False).reason == "the mask is [20, 12], not square"
    odd = hidden_padding(CAUSAL)
    odd[1, 0, -1, 7] = False
    assert classify(odd, padded=True).reason.startswith("padding changes the mask in another way")


def test_chunks_are_counted_from_the_first_real_token_where_padding_moves_them() -> None:
    chunks = CAUSAL & (ROW // 4 == COLUMN // 4)
    moved = CAUSAL & ((ROW - PADDED) // 4 == (COLUMN - PADDED) // 4) & (COLUMN >= PADDED)
    by_column, by_token = classify(hidden_padding(chunks), True), classify(torch.stack([chunks, moved])[:, None], True)
    assert by_column.spec == MaskSpec("chunked", 4, padding=True, from_first_token=False)
    assert by_token.spec == MaskSpec("chunked", 4, padding=True, from_first_token=True)
    unclear = CAUSAL & (ROW // PADDED == COLUMN // PADDED)
    assert "cannot be told" in classify(hidden_padding(unclear), True).reason


# ---- names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "owner"),
    [
        (("h.0.attn.q.weight", "h.0.attn.k.weight", "h.0.attn.o.weight"), "h.0.attn"),
        (("h.0.attn.c_attn.weight", "h.0.attn.c_proj.weight"), "h.0.attn"),
        (("h.0.attn.qkv", "h.0.attn.out"), "h.0"),
        (("h.0.attn.qkv.weight",), "h.0.attn"),
        (("h.0.attn.q.weight", "h.1.attn.q.weight"), "h"),
        ((), "scope"),
        (("a.q.weight", "b.k.weight"), "scope"),
    ],
)
def test_the_owner_is_the_common_prefix(names: tuple[str, ...], owner: str) -> None:
    assert owner_name(names, "scope") == owner


# ---- steps that cannot be continued ----------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe", ["none", "lolcats{window=40}"])
def test_positions_counted_from_the_end_run_whole_under_every_recipe(recipe: str) -> None:
    compiled = zoo.compile_again("reversed_positions", recipe, tokens=0)
    assert "arange looks ahead" in compiled.program.stateless_reason
    ids = zoo.tokens(2, 15)
    with torch.no_grad():
        actual = compiled(ids).logits
    assert zoo.difference(actual, zoo.source_logits("reversed_positions", ids)) <= 1e-4
