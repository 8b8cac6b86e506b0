"""transformers' own generate on a compiled model: greedy, sampled, beams, streamed, padded."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import pytest
import torch
from transformers import TextIteratorStreamer

from linearize.errors import StateError
from linearize.huggingface.cache import StateCache
from linearize.huggingface.model import LinearizedForCausalLM
from tests import zoo

RECIPE = "lolcats{window=5}"
PLAIN: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
PADDING = (0, 3, 11)


@cache
def model(name: str = "llama", recipe: str = RECIPE) -> LinearizedForCausalLM:
    return zoo.compiled(name, recipe).to_transformers()


def padded(length: int = 13) -> tuple[torch.Tensor, torch.Tensor]:
    ids = zoo.tokens(len(PADDING), length)
    mask = torch.ones_like(ids)
    for row, count in enumerate(PADDING):
        ids[row, :count], mask[row, :count] = 0, 0
    return ids, mask


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_greedy_of_padded_rows_equals_our_own(name: str) -> None:
    ids, mask = padded()
    expected = zoo.compiled(name, RECIPE).generate(ids, 9, attention_mask=mask)
    assert torch.equal(model(name).generate(ids, attention_mask=mask, max_new_tokens=9, **PLAIN), expected)


def test_none_equals_the_sources_generate() -> None:
    ids, mask = padded()
    source: Any = zoo.source("llama")
    for options in ({}, {"num_beams": 3}, {"repetition_penalty": 1.4}):
        expected = source.generate(ids, attention_mask=mask, max_new_tokens=9, **PLAIN, **options)
        actual = model(recipe="none").generate(ids, attention_mask=mask, max_new_tokens=9, **PLAIN, **options)
        assert torch.equal(actual, expected)


def reference_beams(ids: torch.Tensor, beams: int, new: int) -> list[list[int]]:
    """The best of `beams` hypotheses of `new` tokens of every row, each score computed from the whole sequence."""
    best = []
    for row in ids.tolist():
        kept = [(0.0, row)]
        for _ in range(new):
            with torch.no_grad():
                logits = model()(torch.tensor([tokens for _, tokens in kept]), use_cache=False).logits[:, -1]
            scores = logits.log_softmax(-1)
            longer = [
                (score + float(scores[place, token]), [*tokens, token])
                for place, (score, tokens) in enumerate(kept)
                for token in range(scores.shape[1])
            ]
            kept = sorted(longer, key=lambda pair: -pair[0])[:beams]
        best.append(kept[0][1])
    return best


def test_beam_search_equals_one_that_computes_every_sequence_anew() -> None:
    ids = zoo.tokens(2, 8)
    found = model().generate(ids, max_new_tokens=6, num_beams=4, **PLAIN)
    assert found.tolist() == reference_beams(ids, beams=4, new=6)
    assert found.tolist() != model().generate(ids, max_new_tokens=6, **PLAIN).tolist(), "beams made no difference"


def test_samples_repeat_with_the_seed_and_return_several_sequences() -> None:
    ids = zoo.tokens(2, 6)
    options: dict[str, Any] = {**PLAIN, "do_sample": True, "num_return_sequences": 3, "max_new_tokens": 8}
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(model().generate(ids, **options))
    assert found[0].shape == (6, 14)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_streamer_sees_the_tokens() -> None:
    seen: list[int] = []

    class Streamer(TextIteratorStreamer):
        def __init__(self) -> None:
            pass

        def put(self, value: torch.Tensor) -> None:
            seen.extend(value.flatten().tolist())

        def end(self) -> None:
            seen.append(-1)

    ids = zoo.tokens(1, 5)
    found = model().generate(ids, max_new_tokens=4, streamer=Streamer(), **PLAIN)
    assert seen == [*found[0].tolist(), -1]


def test_a_model_that_cannot_step_generates_from_whole_sequences() -> None:
    ids = zoo.tokens(2, 6)
    expected = ids
    compiled = zoo.compiled("prefix")
    with torch.no_grad():
        for _ in range(4):
            expected = torch.cat([expected, compiled(expected).logits[:, -1:].argmax(-1)], dim=1)
    found = LinearizedForCausalLM.of(compiled).generate(ids, max_new_tokens=4, **PLAIN)
    assert torch.equal(found, expected)


# ---- the cache -------------------------------------------------------------------------------------------------------


def test_a_prompts_cache_is_forked_and_continued() -> None:
    ids = zoo.tokens(1, 20)
    cached = model()(ids[:, :12], past_key_values=StateCache()).past_key_values
    assert (cached.get_seq_length(), cached.nbytes) == (12, zoo.compiled("llama", RECIPE).state_bytes())
    for end in (14, 20):
        fork = copy.deepcopy(cached)
        found = model().generate(ids[:, :end], past_key_values=fork, max_new_tokens=5, **PLAIN)
        assert torch.equal(found, model().generate(ids[:, :end], max_new_tokens=5, **PLAIN))
    assert cached.get_seq_length() == 12


def test_a_cache_selects_and_repeats_rows() -> None:
    ids = zoo.tokens(3, 9)
    cached = model()(ids[:, :8], past_key_values=StateCache()).past_key_values
    expected = model()(ids[:, 8:], past_key_values=copy.deepcopy(cached)).logits
    chosen = copy.deepcopy(cached)
    chosen.batch_select_indices(torch.tensor([2, 0]))
    assert zoo.difference(model()(ids[[2, 0], 8:], past_key_values=chosen).logits, expected[[2, 0]]) <= 1e-6
    doubled = copy.deepcopy(cached)
    doubled.batch_repeat_interleave(2)
    rows = [0, 0, 1, 1, 2, 2]
    assert zoo.difference(model()(ids[rows, 8:], past_key_values=doubled).logits, expected[rows]) <= 1e-6


def test_a_cache_does_not_forget_and_says_so() -> None:
    cached = model()(zoo.tokens(1, 4), past_key_values=StateCache()).past_key_values
    cached.crop(0)
    with pytest.raises(StateError, match=r"cannot forget its last 2 tokens; keep copy.deepcopy\(cache\)"):
        cached.crop(-2)
    cached.reset()
    assert (cached.get_seq_length(), cached.is_initialized, cached.nbytes) == (0, False, 0)


def test_an_offloaded_state_gives_the_same_tokens() -> None:
    ids, mask = padded()
    expected = model().generate(ids, attention_mask=mask, max_new_tokens=6, **PLAIN)
    options = {**PLAIN, "cache_implementation": "offloaded", "return_dict_in_generate": True}
    found = model().generate(ids, attention_mask=mask, max_new_tokens=6, **options)
    assert torch.equal(found.sequences, expected)
    assert found.past_key_values.offloading
    assert {tensor.device.type for tensor in found.past_key_values.state.values()} == {"cpu"}


def test_caches_of_keys_and_values_are_refused() -> None:
    from transformers import DynamicCache

    with pytest.raises(StateError, match="the cache is a DynamicCache; pass None or a StateCache"):
        model()(zoo.tokens(1, 4), past_key_values=DynamicCache())
    with pytest.raises(StateError, match="cache_implementation 'static' is for key-value caches"):
        model().generate(zoo.tokens(1, 4), cache_implementation="static", max_new_tokens=2, **PLAIN)


def test_a_long_prompt_is_fed_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    ids, mask = padded(40)
    expected = model().generate(ids, attention_mask=mask, max_new_tokens=5, **PLAIN)
    lengths: list[int] = []
    own = model()
    monkeypatch.setattr("linearize.runtime.generate.PREFILL_PIECE", 16)
    graph = own._prompt
    monkeypatch.setattr(own, "_prompt", lambda ids, *rest: (lengths.append(ids.shape[1]), graph(ids, *rest))[1])
    assert torch.equal(own.generate(ids, attention_mask=mask, max_new_tokens=5, **PLAIN), expected)
    assert lengths[:3] == [16, 16, 8]
