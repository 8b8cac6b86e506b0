"""Generation: greedy and sampled, batched with padding, prompts fed in pieces."""

from typing import Any

import pytest
import torch

from linearize.errors import DataError
from linearize.runtime.generate import Sampling, choose, prefill
from tests import zoo

RECIPE = "lolcats{window=5}"


def test_greedy_equals_the_argmax_of_whole_sequences() -> None:
    model, ids = zoo.compiled("llama", RECIPE), zoo.tokens(2, 7)
    expected = ids
    with torch.no_grad():
        for _ in range(9):
            expected = torch.cat([expected, model(expected).logits[:, -1].argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(model.generate(ids, max_new_tokens=9), expected)
    assert torch.equal(model.generate(ids, max_new_tokens=0), ids)


def test_greedy_of_none_equals_the_sources_own_generate() -> None:
    ids = zoo.tokens(2, 7)
    source: Any = zoo.source("llama")
    expected = source.generate(ids, max_new_tokens=9, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(zoo.compiled("llama", "none").generate(ids, max_new_tokens=9), expected)


def test_left_padded_rows_generate_what_they_generate_alone() -> None:
    model, ids = zoo.compiled("llama", RECIPE), zoo.tokens(3, 9)
    mask = torch.ones_like(ids)
    for row, padding in enumerate((0, 2, 8)):
        mask[row, :padding] = 0
    together = model.generate(ids, max_new_tokens=6, attention_mask=mask)
    for row, padding in enumerate((0, 2, 8)):
        alone = model.generate(ids[row : row + 1, padding:], max_new_tokens=6)
        assert torch.equal(together[row, 9:], alone[0, 9 - padding :])


@pytest.mark.parametrize("piece", [1, 4, 9, 100])
def test_a_prompt_fed_in_pieces_gives_the_same_logits(piece: int) -> None:
    model, ids = zoo.compiled("llama", RECIPE), zoo.tokens(2, 9)
    with torch.no_grad():
        expected, _ = prefill(model, ids)
        actual, _ = prefill(model, ids, piece=piece)
    assert zoo.difference(actual, expected) <= 1e-4


def test_rows_that_ended_are_filled_and_all_ended_stops() -> None:
    model, ids = zoo.compiled("llama", RECIPE), zoo.tokens(2, 7)
    free = model.generate(ids, max_new_tokens=8)[:, 7:]
    end = int(free[0, 2])
    first = [(row == end).nonzero()[0].item() if bool((row == end).any()) else 7 for row in free]
    actual = model.generate(ids, max_new_tokens=8, eos_token_id=end)[:, 7:]
    assert actual.shape[1] == max(first) + 1
    for row, stop in enumerate(first):
        assert torch.equal(actual[row, : stop + 1], free[row, : min(stop + 1, actual.shape[1])])
        assert bool((actual[row, stop + 1 :] == end).all())


def test_a_seed_repeats_and_another_differs() -> None:
    model, ids = zoo.compiled("llama", RECIPE), zoo.tokens(2, 4)
    options: dict = {"max_new_tokens": 20, "do_sample": True, "temperature": 2.0}
    one, two, three = (model.generate(ids, seed=seed, **options) for seed in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_the_streamer_sees_every_token_once() -> None:
    model, ids = zoo.compiled("llama", RECIPE), zoo.tokens(2, 4)
    seen: list[torch.Tensor] = []
    result = model.generate(ids, max_new_tokens=5, streamer=seen.append)
    assert torch.equal(torch.stack(seen, dim=1), result[:, 4:])


LOGITS = torch.tensor([[0.0, 3.0, 2.0, 1.0]]).expand(4000, -1)


def frequencies(**options: object) -> torch.Tensor:
    sampling = Sampling(do_sample=True, **options)  # type: ignore[arg-type]
    drawn = choose(LOGITS, sampling, torch.Generator().manual_seed(0))
    return torch.bincount(drawn, minlength=4) / len(LOGITS)


def test_samples_follow_the_distribution() -> None:
    torch.testing.assert_close(frequencies(), LOGITS[0].softmax(-1), atol=0.03, rtol=0)
    torch.testing.assert_close(frequencies(temperature=2.0), (LOGITS[0] / 2).softmax(-1), atol=0.03, rtol=0)


def test_top_k_and_top_p_cut_the_tail() -> None:
    assert (frequencies(top_k=2) > 0).tolist() == [False, True, True, False]
    assert (frequencies(top_k=1) > 0).tolist() == [False, True, False, False]
    assert (frequencies(top_p=0.5) > 0).tolist() == [False, True, False, False]
    assert (frequencies(top_p=0.7) > 0).tolist() == [False, True, True, False]
    assert (frequencies(top_k=99) > 0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_sample": True, "temperature": 0.0}, "temperature must be above 0, not 0.0; for greedy use do_sample=F"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"top_k": -1}, "top_k at least 0"),
        ({"max_new_tokens": -1}, "max_new_tokens must be at least 0"),
    ],
)
def test_options_out_of_range_are_refused(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        zoo.compiled("llama", RECIPE).generate(zoo.tokens(1, 3), **options)


def test_generating_past_the_learned_positions_is_told() -> None:
    from linearize.errors import StateError

    with pytest.raises(StateError, match="65 tokens pass the source's 64 learned positions"):
        zoo.compiled("nano_gpt").generate(zoo.tokens(1, 60), max_new_tokens=6)
