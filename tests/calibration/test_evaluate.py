"""Measures against small computations written another way."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import linearize
from linearize.calibration.evaluate import (
    Recall,
    agreement,
    logits_of,
    mixers_at_start,
    mixers_of,
    overall,
    perplexity,
    recall,
    site_errors,
)
from linearize.calibration.recall import RecallBatch, key_value_pairs, repeated_segments
from linearize.errors import DataError
from linearize.passes.rewrite import InsertMixers, RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.recipe import Recipe

VOCAB = 11


def table_model(seed: int) -> nn.Module:
    """Logits that depend on the last token alone."""
    torch.manual_seed(seed)
    return nn.Embedding(VOCAB, VOCAB)


def probabilities(model: nn.Module) -> np.ndarray:
    scores = model.weight.detach().numpy().astype(np.float64)  # type: ignore[operator,union-attr]
    return np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)


ROWS = [torch.randint(0, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1)), torch.tensor([[3, 1, 4, 1, 5]])]


def test_perplexity_of_a_uniform_model_is_the_vocabulary() -> None:
    assert perplexity(lambda ids: torch.zeros(*ids.shape, VOCAB), ROWS) == pytest.approx(VOCAB)


def test_perplexity_weighs_every_predicted_token_alike() -> None:
    model, losses = table_model(0), []
    table = probabilities(model)
    for row in [*ROWS[0].tolist(), *ROWS[1].tolist()]:
        losses += [-math.log(table[before, after]) for before, after in pairwise(row)]
    assert perplexity(logits_of(model), ROWS) == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-6)


def test_perplexity_of_nothing_is_an_error() -> None:
    with pytest.raises(DataError, match="no token to predict"):
        perplexity(logits_of(table_model(0)), [torch.zeros(1, 1, dtype=torch.int64)])
    with pytest.raises(DataError):
        perplexity(logits_of(table_model(0)), [])


def test_agreement_is_kl_and_the_share_of_equal_choices() -> None:
    teacher, student = table_model(0), table_model(1)
    p, q = probabilities(teacher), probabilities(student)
    tokens = [token for rows in ROWS for token in rows.flatten().tolist()]
    kl = [float((p[token] * np.log(p[token] / q[token])).sum()) for token in tokens]
    same = [p[token].argmax() == q[token].argmax() for token in tokens]
    found = agreement(logits_of(teacher), logits_of(student), ROWS)
    assert found.kl == pytest.approx(sum(kl) / len(kl), rel=1e-5)
    assert found.top1 == pytest.approx(sum(same) / len(same))
    assert found.tokens == len(tokens)


def test_a_model_agrees_with_itself() -> None:
    found = agreement(logits_of(table_model(0)), logits_of(table_model(0)), ROWS)
    assert (found.kl, found.top1) == (pytest.approx(0, abs=1e-9), 1.0)


# ---- recall ----------------------------------------------------------------------------------------------------------


def copier(reach: int) -> nn.Module:
    """Predicts what followed the latest earlier occurrence of the present token, if it stands within `reach`."""

    class Copier(nn.Module):
        def forward(self, ids: Tensor) -> Tensor:
            logits = torch.zeros(*ids.shape, 64)
            for row, tokens in enumerate(ids.tolist()):
                for at, token in enumerate(tokens):
                    earlier = [j for j in range(max(0, at - reach), at) if tokens[j] == token]
                    if earlier:
                        logits[row, at, tokens[earlier[-1] + 1]] = 1.0
            return logits

    return Copier()


def recall_set() -> list[RecallBatch]:
    generator = torch.Generator().manual_seed(0)
    return [
        key_value_pairs(2, 40, token_range=(3, 64), n_pairs=6, generator=generator),
        key_value_pairs(2, 60, token_range=(3, 64), n_pairs=6, generator=generator),
    ]


def test_recall_of_a_short_sighted_copier_ends_at_its_reach() -> None:
    batches = recall_set()
    distances = torch.cat([batch.distance[batch.mask] for batch in batches])
    edge = int(distances.median()) + 1
    table = recall(logits_of(copier(edge - 1)), batches, (1, edge, 100))
    assert [(row.low, row.high) for row in table] == [(1, edge - 1), (edge, 99)]
    assert [row.count for row in table] == [int((distances < edge).sum()), int((distances >= edge).sum())]
    assert table[0].accuracy == 1.0
    assert table[1].accuracy < 0.2


def test_ranges_without_answers_are_left_out_and_overall_weighs_by_count() -> None:
    assert [row.low for row in recall(logits_of(copier(100)), recall_set(), (1, 3, 100, 200))] == [3]
    assert overall([Recall(1, 2, 1.0, 30), Recall(3, 4, 0.0, 10)]) == 0.75
    assert math.isnan(overall([]))


# ---- sites -----------------------------------------------------------------------------------------------------------


class Causal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        output = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.out(output.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(30, 16), nn.Linear(16, 30)
        self.first, self.second = Causal(), Causal()

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        x = x + self.first(x)
        return self.head(x + self.second(x))


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def teacher(model: nn.Module) -> linearize.program.Program:
    return run_pipeline(linearize.capture(model), [RaiseAttention()])


def heads_of(model: nn.Module, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(query, key, value) of both attentions, taken from the plain model by hooks."""
    seen: list[Tensor] = []
    hooks = [
        layer.qkv.register_forward_hook(lambda module, inputs, output: seen.append(output))
        for layer in (model.first, model.second)
    ]
    with torch.no_grad():
        model(ids)
    for hook in hooks:
        hook.remove()
    return [tuple(part.unflatten(-1, (2, 8)).transpose(1, 2) for part in one.chunk(3, dim=-1)) for one in seen]  # type: ignore[misc]


def test_site_errors_of_a_window_equal_the_masked_softmax(model: nn.Module, teacher: linearize.program.Program) -> None:
    rows = [torch.randint(0, 30, (2, 20), generator=torch.Generator().manual_seed(2)) for _ in range(2)]
    plan = Recipe.load("window{window=5,sinks=0}").plan(teacher.matched)
    found = site_errors(teacher, mixers_at_start(teacher, plan), rows)
    gap = torch.arange(20)[:, None] - torch.arange(20)[None, :]
    for site in (0, 1):
        heads = [heads_of(model, ids)[site] for ids in rows]
        full = torch.cat([F.scaled_dot_product_attention(*one, is_causal=True) for one in heads])
        near = torch.cat([F.scaled_dot_product_attention(*one, attn_mask=(gap >= 0) & (gap < 5)) for one in heads])
        expected = ((near - full).square().mean() / full.var(unbiased=False)).item()
        assert found[site] == pytest.approx(expected, rel=1e-4)


def test_kept_attention_has_no_error_and_sites_without_a_mixer_are_passed_over(
    teacher: linearize.program.Program,
) -> None:
    mixers = mixers_at_start(teacher, Recipe.load("none").plan(teacher.matched))
    found = site_errors(teacher, {1: mixers[1]}, [torch.arange(12).unsqueeze(0)])
    assert list(found) == [1]
    assert found[1] < 1e-10


def test_the_mixers_of_a_rewritten_program_are_those_in_it(teacher: linearize.program.Program) -> None:
    plan = Recipe.load("lolcats{window=5}").plan(teacher.matched)
    program = run_pipeline(teacher, [InsertMixers(plan)])
    mixers = mixers_of(program)
    assert list(mixers) == [0, 1]
    with torch.no_grad():
        mixers[1].omega.fill_(0.5)  # type: ignore[operator,union-attr]
    assert mixers_of(program)[1].omega[0].item() == 0.5  # type: ignore[index]


def test_logits_of_takes_tensors_and_outputs() -> None:
    class Wrapped(nn.Module):
        def forward(self, ids: Tensor) -> object:
            return type("Output", (), {"logits": torch.ones(*ids.shape, 2)})()

    assert logits_of(Wrapped())(ROWS[1]).shape == (1, 5, 2)
    assert logits_of(table_model(0))(ROWS[1]).shape == (1, 5, VOCAB)


def test_repeated_segments_are_scored_too() -> None:
    batch = repeated_segments(1, 60, token_range=(3, 64), segment=(20, 20), generator=torch.Generator().manual_seed(0))
    (row,) = recall(logits_of(copier(25)), [batch], (1, 64))
    assert row.accuracy > 0.5  # a symbol may occur twice in a segment
