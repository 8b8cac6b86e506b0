"""A compiled model against its source, whole: text by shard and by position, recall by distance, every site.

    perplexity     exp of the mean negative log-likelihood of a token given those before it
    KL, top-1      mean KL(source || compiled) in nats a token, and the share of equal most likely tokens
    recall         top-1 accuracy where the answer stands that far back in the context (recall.py): repeated segments
                   (copy), key-value pairs (mqar), a key in filler (passkey)
    error          relative MSE of a site's output, mean (y' - y)^2 / var(y), on the source's own inputs; beside it that
                   of softmax over the same window with nothing far, which tells what the far field earns, and that with
                   the window cut to the query's own token, which tells what the window earns

Each row of text goes through each model once; sums are in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from linearize.calibration.end_to_end_pair import cut_windows, has_window
from linearize.calibration.evaluate import (
    Logits,
    logits_of,
    mixers_at_start,
    mixers_of,
    overall,
    recall_table,
    site_errors,
)
from linearize.calibration.recall import RecallBatch, key_value_pairs, passkey, recall_hits, repeated_segments
from linearize.errors import DataError
from linearize.plan import Plan, PlanEntry
from linearize.program import Program
from linearize.progress import Progress
from linearize.spec import Site

FIRST_SYMBOL = 16  # ids below are mostly special tokens; recall symbols are drawn from those above
EARNS = 0.99  # a far field that leaves more than this share of the window's error does nothing
ROWS_AT_ONCE = 4
KEY = 8  # tokens of a passkey with its marker


@dataclass(frozen=True)
class Suite:
    """What to measure on: `shards` of text, each batches of token ids int64 [B, T], and recall by kind with its ranges
    of distances."""

    shards: dict[str, list[Tensor]]
    recall: dict[str, list[RecallBatch]]
    edges: list[int]


@dataclass
class TextSums:
    """Sums over text, by position t of the predicted token where they are [T]."""

    losses: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    counts: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.float64))
    kl: float = 0.0
    same: int = 0
    compared: int = 0

    def add(self, ids: Tensor, logits: Tensor, expected: Tensor | None = None) -> None:
        """One batch: ids [B, T], a model's logits [B, T, V], and its source's, if it is not the source itself."""
        losses = nn.functional.cross_entropy(logits[:, :-1].float().mT, ids[:, 1:], reduction="none").double().sum(0)
        self._grow(len(losses))
        self.losses[: len(losses)] += losses.cpu()
        self.counts[: len(losses)] += ids.shape[0]
        if expected is not None:
            teacher, student = expected.float().log_softmax(-1), logits.float().log_softmax(-1)
            self.kl += (teacher.exp() * (teacher - student)).double().sum().item()
            self.same += int((teacher.argmax(-1) == student.argmax(-1)).sum())
            self.compared += ids.numel()

    def _grow(self, length: int) -> None:
        short = length - len(self.losses)
        if short > 0:
            self.losses, self.counts = (nn.functional.pad(sums, (0, short)) for sums in (self.losses, self.counts))

    def plus(self, other: TextSums) -> TextSums:
        both = TextSums(kl=self.kl + other.kl, same=self.same + other.same, compared=self.compared + other.compared)
        both._grow(max(len(self.losses), len(other.losses)))
        for part in (self, other):
            both.losses[: len(part.losses)] += part.losses
            both.counts[: len(part.counts)] += part.counts
        return both

    def figures(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "perplexity": _perplexity(self.losses, self.counts),
            "tokens": int(self.counts.sum()),
            "by_position": [
                {"low": low, "high": high - 1, "perplexity": _perplexity(self.losses[low - 1 : high - 1],
                                                                         self.counts[low - 1 : high - 1])}
                for low, high in pairwise(position_edges(len(self.losses)))
            ],
        }  # fmt: skip
        if self.compared:
            found |= {"kl": self.kl / self.compared, "top1": self.same / self.compared}
        return found


def _perplexity(losses: Tensor, counts: Tensor) -> float:
    total, count = losses.sum().item(), counts.sum().item()
    if not count:
        raise DataError("there is no token to predict: the text is empty or one token long")
    return math.exp(min(total / count, 700.0))


def position_edges(length: int) -> list[int]:
    """Bounds of ranges of positions 1 .. length, doubling from 64."""
    edges = [1]
    while 2 * max(edges[-1], 32) <= length:
        edges.append(2 * max(edges[-1], 32))
    return [*edges, length + 1]


def recall_suite(
    vocab_size: int, window: int, length: int, rows: int, seed: int, bos_token_id: int = 0, far: int = 0
) -> tuple[dict[str, list[RecallBatch]], list[int]]:
    """({"copy", "mqar", "passkey"}, the bounds of the distances to report): rows of `length` tokens whose answers stand
    window + 1 to length / 2 tokens back; with `far` > `length` also rows of `far` tokens, whose answers stand up to
    far / 2 (a passkey: nearly far) tokens back.

    Raises:
        DataError: `length` is too short to look beyond the window, or the vocabulary too small to draw symbols from.
    """
    if length < 4 * window + 4:
        needed = 4 * window + 4
        raise DataError(f"recall beyond a window of {window} needs rows of {needed} tokens or more, not {length}")
    low = FIRST_SYMBOL if vocab_size > 4 * FIRST_SYMBOL else 0
    if vocab_size - low < 8:
        raise DataError(f"a vocabulary of {vocab_size} is too small for recall")
    generator = torch.Generator().manual_seed(seed)
    common: dict[str, Any] = {
        "token_range": (low, vocab_size), "generator": generator, "bos_token_id": bos_token_id,
    }  # fmt: skip
    edges = distance_edges(window, length // 2)
    kinds = _kinds(rows, length, edges, common)
    if far > length:
        beyond = distance_edges(length // 2 - 1, far - 1)
        more = _kinds(max(1, rows // 4), far, [edge for edge in beyond if edge <= far // 2], common)
        kinds = {name: [*batches, *more[name]] for name, batches in kinds.items()}
        kinds["passkey"] += _passkeys(max(1, rows // 4), far, beyond[-2:], common)
        edges = [*edges[:-1], *beyond]
    return kinds, edges


def distance_edges(window: int, farthest: int) -> list[int]:
    """Bounds from just beyond the window, doubling, to `farthest`."""
    edges = [window + 1]
    while 3 * edges[-1] <= farthest:
        edges.append(2 * edges[-1])
    return [*edges, farthest]


def _kinds(rows: int, length: int, edges: Sequence[int], common: dict[str, Any]) -> dict[str, list[RecallBatch]]:
    low, high = common["token_range"]
    count = min((high - low) // 4, max(2, length // 24))
    return {
        "copy": [repeated_segments(rows, length, segment=(a, b - 1), **common) for a, b in pairwise(edges)],
        "mqar": [key_value_pairs(rows, length, n_pairs=count, **common)],
        "passkey": _passkeys(rows, length, edges, common),
    }


def _passkeys(rows: int, length: int, edges: Sequence[int], common: dict[str, Any]) -> list[RecallBatch]:
    if length < 2 * KEY + 1:
        return []
    return [passkey(rows, length, distance=(a, b - 1), **common) for a, b in pairwise(edges)]


def evaluate_pair(source: nn.Module, compiled: nn.Module, suite: Suite, progress: Progress) -> dict[str, Any]:
    """{"source", "compiled"}: {text figures, "shards", "recall", "recall_by_distance", "recall_by_kind"} of two."""
    models = {"source": logits_of(source), "compiled": logits_of(compiled)}
    shards = {name: _text(models, batches, name, progress) for name, batches in suite.shards.items()}
    found: dict[str, Any] = {}
    for name, model in models.items():
        total = TextSums()
        for sums in shards.values():
            total = total.plus(sums[name])
        hits = {
            kind: [recall_hits(model, batch) for batch in progress.track(batches, f"{kind} of the {name}")]
            for kind, batches in suite.recall.items()
        }
        table = recall_table([hit for found_hits in hits.values() for hit in found_hits], suite.edges)
        by_kind = {kind: recall_table(found_hits, suite.edges) for kind, found_hits in hits.items()}
        found[name] = {
            **total.figures(),
            "shards": {shard: sums[name].figures() for shard, sums in shards.items()},
            "recall": overall(table) if table else None,
            "recall_by_distance": [asdict(row) for row in table],
            "recall_by_kind": {kind: [asdict(row) for row in rows] for kind, rows in by_kind.items()},
        }
    return found


@torch.no_grad()
def _text(models: dict[str, Logits], batches: list[Tensor], name: str, progress: Progress) -> dict[str, TextSums]:
    sums = {model: TextSums() for model in models}
    parts = [part for batch in batches for part in batch.split(ROWS_AT_ONCE)]
    for ids in progress.track(parts, f"reading {name}"):
        expected = models["source"](ids)
        sums["source"].add(ids, expected)
        sums["compiled"].add(ids, models["compiled"](ids), expected)
    return sums


def evaluate_sites(teacher: Program, compiled: Program, plan: Plan, rows: list[Tensor]) -> list[dict[str, Any]]:
    """The error of every site's mixer; of the plain window that it holds, if it holds one; and with that window cut to
    one token, where there is a far field beside it.

    Args:
        teacher: the source, raised.
        compiled: the rewritten program (`LinearizedModel.source`).
        rows: token ids int64 [B, T].
    """
    mixers = mixers_of(compiled)
    errors = site_errors(teacher, mixers, rows)
    with cut_windows(compiled):
        cut = site_errors(teacher, {site: mixer for site, mixer in mixers.items() if has_window(mixer)}, rows)
    bare = {site.index: found for site in teacher.matched if (found := _bare_window(site, plan)) is not None}
    whole = Plan(entries=tuple(bare.get(entry.site, entry.model_copy(update=KEPT)) for entry in plan.entries))
    without = site_errors(teacher, {i: m for i, m in mixers_at_start(teacher, whole).items() if i in bare}, rows)
    return [
        {"site": entry.site, "module": entry.module, "mixer": entry.label(), "error": errors[entry.site],
         "error_of_window": without.get(entry.site), "error_without_window": cut.get(entry.site)}
        for entry in plan.entries if entry.site in errors
    ]  # fmt: skip


KEPT: dict[str, Any] = {"mixer": "keep", "options": {}}


def _bare_window(site: Site, plan: Plan) -> PlanEntry | None:
    from linearize.mixers import mixer_class

    entry = plan.entry(site.index)
    options = {key: entry.options[key] for key in ("window", "sinks") if key in entry.options}
    if "window" not in options or entry.mixer == "window" or mixer_class("window").refusal(site) is not None:
        return None
    return entry.model_copy(update={"mixer": "window", "options": options})


def warnings_of(sites: Sequence[dict[str, Any]]) -> list[str]:
    """Sites of which a branch does nothing: without it the rest is as close."""
    found = []
    for site in sites:
        at, error = f"site {site['site']} ({site['module']})", site["error"]
        for key, without, rest in (
            ("error_of_window", "its far field", "the window alone"),
            ("error_without_window", "its window", "the far field alone"),
        ):
            bare = site.get(key)
            if bare is not None and error > EARNS * bare:
                found.append(f"{at}: without {without} {rest} is as close ({bare:.4f} against {error:.4f})")
    return found
