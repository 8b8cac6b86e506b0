"""The whole evaluation of a pair of models, against small computations written another way."""

import math

import pytest
import torch
from torch import nn

import linearize
from linearize.calibration.evaluate import agreement, logits_of, perplexity
from linearize.calibration.evaluation import (
    Suite,
    TextSums,
    evaluate_pair,
    evaluate_sites,
    position_edges,
    recall_suite,
    warnings_of,
)
from linearize.errors import DataError
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.progress import Progress
from tests import zoo

VOCAB = 97


def table_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Embedding(VOCAB, VOCAB)


def rows(count: int, length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB, (count, length), generator=torch.Generator().manual_seed(count))


def test_shards_and_positions_add_up_to_the_whole() -> None:
    source, compiled = table_model(0), table_model(1)
    shards = {"one": [rows(5, 200)], "two": [rows(2, 40), rows(1, 70)]}
    every = [batch for batches in shards.values() for batch in batches]
    found = evaluate_pair(source, compiled, Suite(shards, {}, []), Progress(False))
    close = agreement(logits_of(source), logits_of(compiled), every)
    assert found["compiled"]["perplexity"] == pytest.approx(perplexity(logits_of(compiled), every), rel=1e-9)
    assert found["compiled"]["kl"] == pytest.approx(close.kl, rel=1e-9)
    assert found["compiled"]["top1"] == close.top1
    assert "kl" not in found["source"]
    for name, batches in shards.items():
        shard = found["source"]["shards"][name]["perplexity"]
        assert shard == pytest.approx(perplexity(logits_of(source), batches), rel=1e-9)
    late = [row["perplexity"] for row in found["source"]["by_position"]]
    by_hand = nn.functional.cross_entropy(source(shards["one"][0])[:, 127:-1].mT, shards["one"][0][:, 128:])
    assert late[-1] == pytest.approx(math.exp(by_hand.item()), rel=1e-5)


def test_positions_are_counted_from_the_first_predicted_token() -> None:
    assert position_edges(40) == [1, 41]
    assert position_edges(511) == [1, 64, 128, 256, 512]
    sums = TextSums()
    sums.add(torch.zeros(3, 5, dtype=torch.int64), torch.zeros(3, 5, VOCAB))
    assert (sums.figures()["tokens"], sums.figures()["perplexity"]) == (12, pytest.approx(VOCAB))


def test_text_without_a_token_to_predict_is_an_error() -> None:
    with pytest.raises(DataError, match="no token to predict"):
        TextSums().figures()


def test_a_model_that_looks_back_recalls_and_one_that_does_not_does_not() -> None:
    kinds, edges = recall_suite(VOCAB, window=8, length=128, rows=4, seed=0)
    assert edges == [9, 18, 36, 64]

    class Copies(nn.Module):
        """The token behind the latest earlier occurrence of the last two."""

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            logits = torch.zeros(*ids.shape, VOCAB)
            for row in range(ids.shape[0]):
                seen: dict[tuple[int, int], int] = {}
                for t in range(1, ids.shape[1]):
                    pair = (int(ids[row, t - 1]), int(ids[row, t]))
                    if pair in seen:
                        logits[row, t, seen[pair]] = 1
                    if t + 1 < ids.shape[1]:
                        seen[pair] = int(ids[row, t + 1])
            return logits

    assert set(kinds) == {"copy", "mqar", "passkey"}
    suite = Suite({"text": [rows(1, 16)]}, {kind: kinds[kind] for kind in ("copy", "passkey")}, edges)
    found = evaluate_pair(Copies(), table_model(0), suite, Progress(False))
    assert found["source"]["recall"] > 0.9
    assert found["compiled"]["recall"] < 0.1
    for kind in ("copy", "passkey"):
        table = found["source"]["recall_by_kind"][kind]
        assert min(row["accuracy"] for row in table) > 0.85
        assert sum(row["count"] for row in table) > 0


@pytest.mark.parametrize(
    ("vocabulary", "length", "message"), [(VOCAB, 30, "needs rows of 36 tokens"), (6, 64, "vocabulary of 6")]
)
def test_recall_that_cannot_be_asked_is_refused(vocabulary: int, length: int, message: str) -> None:
    with pytest.raises(DataError, match=message):
        recall_suite(vocabulary, window=8, length=length, rows=2, seed=0)


def test_sites_are_measured_with_and_without_their_far_field() -> None:
    teacher = run_pipeline(zoo.captured("llama"), [RaiseAttention()])
    data = [rows(2, 40)]
    slots = linearize.compile(zoo.captured("llama"), "slots{window=4,slots=16}", tokens=0, progress=False)
    found = evaluate_sites(teacher, slots.source, slots.plan, data)
    assert [row["site"] for row in found] == [0, 1]
    assert all(row["error"] < row["error_of_window"] for row in found)
    assert [row["error_without_window"] for row in found] == [None, None]  # its blocks are no window beside a far field
    assert warnings_of(found) == []


def test_recall_goes_far_beyond_the_length_when_asked() -> None:
    near, edges = recall_suite(VOCAB, window=8, length=64, rows=4, seed=0)
    kinds, further = recall_suite(VOCAB, window=8, length=64, rows=4, seed=0, far=512)
    assert edges == [9, 18, 32]
    assert further == [9, 18, 32, 64, 128, 256, 511]
    for kind, batches in kinds.items():
        assert {batch.input_ids.shape[1] for batch in batches} == {64, 512}
        farthest = max(int(batch.distance.max()) for batch in batches)
        assert farthest > 4 * max(int(batch.distance.max()) for batch in near[kind])
    assert max(int(batch.distance.max()) for batch in kinds["passkey"]) > 256


def test_a_window_that_does_nothing_is_said() -> None:
    """With its near branch at zero the mixer is its far field, window or not."""
    teacher = run_pipeline(zoo.captured("llama"), [RaiseAttention()])
    lizard = linearize.compile(zoo.captured("llama"), "lizard{window=4}", tokens=0, progress=False)
    mixers = linearize.calibration.evaluate.mixers_of(lizard.source)
    with torch.no_grad():
        for mixer in mixers.values():
            mixer.alpha.fill_(0.0)
            mixer.beta.fill_(1.0)
    found = evaluate_sites(teacher, lizard.source, lizard.plan, [rows(2, 40)])
    assert all(row["error_without_window"] == pytest.approx(row["error"]) for row in found)
    assert sum("without its window the far field alone is as close" in line for line in warnings_of(found)) == 2
    assert {mixer.line.window for mixer in mixers.values()} == {4}


def test_a_far_field_that_does_nothing_is_said() -> None:
    """LoLCATs starts muted: before a fit it is the window."""
    teacher = run_pipeline(zoo.captured("llama"), [RaiseAttention()])
    muted = linearize.compile(zoo.captured("llama"), "lolcats{window=4,features=8}", tokens=0, progress=False)
    found = evaluate_sites(teacher, muted.source, muted.plan, [rows(2, 40)])
    assert [line.startswith(f"site {index} ") for index, line in enumerate(warnings_of(found))] == [True, True]
    kept = linearize.compile(zoo.captured("llama"), "none", progress=False)
    found = evaluate_sites(teacher, kept.source, kept.plan, [rows(2, 40)])
    assert [row["error_of_window"] for row in found] == [None, None]
