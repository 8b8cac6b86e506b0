"""Synthetic in-context recall: generators and scorers, pure torch.

Two kinds of sequence whose right continuation can only be found by looking back in the context:

* repeated segments: ``BOS s1 .. sL [gap] s1 .. sL [gap] ...``
* key-value pairs (MQAR style): ``BOS k1 v1 .. kn vn  filler  k_a v_a k_b v_b ...``

Both return a `RecallBatch`, which says which positions can be answered by recall and how far back each must look.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DEFAULT_EDGES: tuple[int, ...] = (1, 16, 32, 64, 128, 256, 512, 1024, 2048)


@dataclass(frozen=True)
class RecallBatch:
    """Recall sequences and where they can be scored.

    input_ids: int64 [B, T].
    mask: bool [B, T]; True at t when input_ids[:, t + 1] is recallable from input_ids[:, : t + 1].
    distance: int64 [B, T]; where mask is True, the d such that the answer is copied from t + 1 - d (so the model must
        look back d tokens from the token it is about to write); 0 elsewhere.
    """

    input_ids: Tensor
    mask: Tensor
    distance: Tensor


def cat_batches(batches: Sequence[RecallBatch]) -> RecallBatch:
    """Stack batches of one sequence length along the batch dimension."""
    return RecallBatch(
        torch.cat([b.input_ids for b in batches]),
        torch.cat([b.mask for b in batches]),
        torch.cat([b.distance for b in batches]),
    )


def _uniform_int(low: int, high: int, batch: int, generator: torch.Generator | None) -> Tensor:
    """int64 [batch, 1], uniform on low..high inclusive."""
    return torch.randint(low, max(low, high) + 1, (batch, 1), generator=generator)


def _shuffled_tokens(
    batch: int, token_range: tuple[int, int], avoid: Tensor | None, generator: torch.Generator | None
) -> Tensor:
    """The ids of token_range (high exclusive) in a random order per row, int64 [batch, high - low].

    Ids that occur in `avoid` (int64 [batch, any], may hold ids outside the range) are put last in their row.
    """
    low, high = token_range
    score = torch.rand(batch, high - low, generator=generator)
    if avoid is not None and avoid.numel():
        used = torch.zeros(batch, max(high, int(avoid.max()) + 1)).scatter_(1, avoid, 1.0)
        score = score + used[:, low:high]
    return score.argsort(dim=1) + low


def _draw(table: Tensor, size: Tensor, columns: int, generator: torch.Generator | None) -> Tensor:
    """Draw with replacement from the first size[b] entries of each row of table: int64 [batch, columns]."""
    pick = torch.rand(table.shape[0], columns, generator=generator) * size
    return table.gather(1, pick.long().clamp(max=table.shape[1] - 1))


def repeated_segments(
    batch: int,
    seq_len: int,
    *,
    token_range: tuple[int, int],
    segment: tuple[int, int],
    gap: tuple[int, int] = (0, 0),
    alphabet: tuple[int, int] | None = None,
    bos_token_id: int = 0,
    filler: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RecallBatch:
    """Random segments, each repeated with a fixed period until the row is full.

    token_range: ids [low, high) the symbols come from; every row uses its own random subset of it whose size is
        uniform on `alphabet` (inclusive; the whole range when None).
    segment, gap: inclusive bounds of the segment length L and of the number of filler tokens after each copy. A row's
        gap is cut so that two copies fit; the distance to look back is L + gap.
    filler: int64 [batch, >= seq_len - 1] (for example text) for the gaps; random symbols of the row when None.
    Symbols are drawn with replacement, so a single token can be ambiguous when L is not small against the alphabet.
    """
    body = seq_len - 1
    width = token_range[1] - token_range[0]
    table = _shuffled_tokens(batch, token_range, filler, generator)
    size = _uniform_int(*(alphabet or (width, width)), batch, generator).clamp(max=width)
    length = _uniform_int(*segment, batch, generator).clamp(max=max(1, body // 2))
    gaps = torch.minimum(_uniform_int(*gap, batch, generator), body - 2 * length).clamp(min=0)
    period = length + gaps
    phase = torch.arange(body) % period
    symbols = _draw(table, size, body, generator)
    between = _draw(table, size, body, generator) if filler is None else filler[:, :body]
    ids = torch.where(phase < length, symbols.gather(1, phase), between)
    # The first symbol of a copy has no earlier occurrence of the token before it, unless copies touch (gap 0, third
    # copy on): only then, and inside a copy, does a look back give the answer.
    known = (torch.arange(body) > period) & (phase < length) & ((phase > 0) | (gaps == 0))
    mask = torch.zeros(batch, seq_len, dtype=torch.bool)
    mask[:, :body] = known  # body index i is row position i + 1, hence is predicted from row position i
    ids = torch.cat([torch.full((batch, 1), bos_token_id), ids], dim=1)
    return RecallBatch(ids, mask, period * mask)


def key_value_pairs(
    batch: int,
    seq_len: int,
    *,
    token_range: tuple[int, int],
    n_pairs: int,
    rounds: int = 1,
    bos_token_id: int = 0,
    filler: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RecallBatch:
    """n_pairs key-value pairs, filler up to seq_len, then `rounds` rounds that ask every key in a random order.

    Keys of a row are distinct and occur nowhere else (values and random filler avoid them; with a given filler, keys
    avoid the filler's ids as far as the range allows). Values are drawn with replacement. In the rounds after the first
    the distance is to the latest earlier occurrence of the pair. Needs 1 + 2 * n_pairs * (rounds + 1) <= seq_len.
    filler: int64 [batch, >= filler length] (for example text); random non-key tokens of the range when None.
    """
    space = seq_len - 1 - 2 * n_pairs * (rounds + 1)
    if space < 0:
        raise ValueError(f"{n_pairs} pairs and {rounds} rounds do not fit into {seq_len} tokens")
    between = None if filler is None else filler[:, :space]
    table = _shuffled_tokens(batch, token_range, between, generator)
    keys, others = table[:, :n_pairs], table[:, n_pairs:]
    size = torch.full((batch, 1), others.shape[1])
    values = _draw(others, size, n_pairs, generator)
    if between is None:
        between = _draw(others, size, space, generator)

    slots = torch.arange(n_pairs)
    asked = torch.rand(batch, rounds, n_pairs, generator=generator).argsort(dim=2)
    order = torch.cat([slots.expand(batch, 1, n_pairs), asked], dim=1)  # [B, rounds + 1, n]: which pair stands where
    start = 1 + 2 * n_pairs * torch.arange(rounds + 1) + space * (torch.arange(rounds + 1) > 0)
    at = start[:, None] + 2 * order.argsort(dim=2)  # [B, rounds + 1, n]: position of the key of pair i in each round
    back = (at[:, 1:] - at[:, :-1]).gather(2, order[:, 1:])  # [B, rounds, n]: by slot of the later round

    pairs = torch.stack([keys, values], dim=2)  # [B, n, 2]
    shown = pairs.gather(1, order.reshape(batch, -1, 1).expand(-1, -1, 2)).reshape(batch, -1)
    bos = torch.full((batch, 1), bos_token_id)
    ids = torch.cat([bos, shown[:, : 2 * n_pairs], between, shown[:, 2 * n_pairs :]], dim=1)
    distance = torch.zeros(batch, seq_len, dtype=torch.int64)
    query_at = (start[1:, None] + 2 * slots).reshape(1, -1).expand(batch, -1)
    distance.scatter_(1, query_at, back.reshape(batch, -1))
    return RecallBatch(ids, distance > 0, distance)


def passkey(
    batch: int,
    seq_len: int,
    *,
    token_range: tuple[int, int],
    distance: tuple[int, int],
    marker: int = 3,
    digits: int = 5,
    bos_token_id: int = 0,
    filler: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> RecallBatch:
    """One key hidden in filler: `marker` symbols and `digits` symbols behind them, and the same again at the row's end.

    The digits are to be recalled from `distance` tokens back (inclusive bounds, cut to the row). Symbols avoid the
    filler's ids as far as the range allows. filler: int64 [batch, >= seq_len - 1]; random symbols when None.
    """
    size, body = marker + digits, seq_len - 1
    if body < 2 * size:
        raise ValueError(f"a key of {size} tokens does not fit twice into {seq_len} tokens")
    width = torch.full((batch, 1), token_range[1] - token_range[0])
    everything = torch.arange(*token_range).expand(batch, -1)
    between = _draw(everything, width, body, generator) if filler is None else filler[:, :body].clone()
    key = _shuffled_tokens(batch, token_range, between, generator)[:, :size]
    back = _uniform_int(*distance, batch, generator).clamp(min=size, max=body - size)
    last = body - size
    columns = torch.arange(size)
    between.scatter_(1, last - back + columns, key)
    between[:, last:] = key
    known = torch.zeros(batch, seq_len, dtype=torch.int64)
    known[:, last + marker : last + size] = back
    ids = torch.cat([torch.full((batch, 1), bos_token_id), between], dim=1)
    return RecallBatch(ids, known > 0, known)


def recall_hits(
    logits_fn: Callable[[Tensor], Tensor], batch: RecallBatch, rows_per_call: int = 8
) -> tuple[Tensor, Tensor]:
    """Score every recallable position: (hit bool [N], distance int64 [N]).

    logits_fn maps int64 [B, T] ids to float [B, T, V] next-token logits; it is called on slices of rows.
    """
    hits = []
    with torch.no_grad():
        for rows in torch.arange(batch.input_ids.shape[0]).split(rows_per_call):
            ids, mask = batch.input_ids[rows], batch.mask[rows]
            best = logits_fn(ids).argmax(dim=-1).to(ids.device)
            hits.append((best[:, :-1] == ids[:, 1:])[mask[:, :-1]])
    return torch.cat(hits), batch.distance[:, :-1][batch.mask[:, :-1]]


def recall_accuracy(
    logits_fn: Callable[[Tensor], Tensor],
    batch: RecallBatch,
    edges: Sequence[int] = DEFAULT_EDGES,
    rows_per_call: int = 8,
) -> dict[str, dict[str, float]]:
    """Top-1 recall accuracy by look-back distance: {"128-255": {"accuracy": 0.98, "count": 4096}, ..., "all": ...}.

    edges: increasing lower bounds of the buckets; distances below the first are only in "all". Empty buckets are left
    out.
    """
    hit, distance = recall_hits(logits_fn, batch, rows_per_call)
    table: dict[str, dict[str, float]] = {}
    for low, high in zip(edges, [*edges[1:], None], strict=True):
        inside = (distance >= low) & (distance < high) if high else distance >= low
        if inside.any():
            name = f"{low}-{high - 1}" if high else f"{low}+"
            table[name] = {"accuracy": hit[inside].float().mean().item(), "count": int(inside.sum())}
    table["all"] = {"accuracy": hit.float().mean().item() if hit.numel() else 0.0, "count": hit.numel()}
    return table
