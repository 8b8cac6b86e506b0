"""LinearizedModel: the source's interface, steps with a state, limits and errors told in words."""

from __future__ import annotations

import pytest
import torch

from linearize.errors import DataError, StateError
from linearize.runtime.model import LinearizedModel
from linearize.runtime.state import State
from tests import zoo

RECIPES = ("lolcats{window=5}", "lizard{window=5}", "window{window=5,sinks=2}", "none")


def stepped(model: LinearizedModel, ids: torch.Tensor, pieces: tuple[int, ...], mask: torch.Tensor | None = None):
    found, state, start = [], None, 0
    with torch.no_grad():
        for piece in pieces:
            part = slice(start, start + piece)
            logits, state = model.step(ids[:, part], state, None if mask is None else mask[:, part])
            found.append(logits)
            start += piece
    return torch.cat(found, dim=1), state


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("length", [1, 4, 5, 6, 17])
def test_steps_pieces_and_forward_agree(recipe: str, batch: int, length: int) -> None:
    model, ids = zoo.compiled("llama", recipe), zoo.tokens(batch, length)
    with torch.no_grad():
        whole = model(ids).logits
    cut = max(1, length // 3)
    for pieces in ((1,) * length, (length,), (cut, length - cut) if length > 1 else (1,)):
        actual, state = stepped(model, ids, pieces)
        assert zoo.difference(actual, whole) <= 1e-4
        assert state.tokens == length


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_left_padded_rows_equal_the_rows_alone(recipe: str, name: str) -> None:
    model, ids = zoo.compiled(name, recipe), zoo.tokens(3, 13)
    mask, padding = torch.ones_like(ids), (0, 3, 11)
    if recipe.startswith("lizard") and name == "gpt2":
        assert [site.mixer for site in model.report.sites] == ["lizard{window=5,sink_logits=4}"] * 2
    for row, count in enumerate(padding):
        ids[row, :count], mask[row, :count] = 0, 0
    for pieces in ((13,), (7, 6), (2, 10, 1), (1,) * 13):
        batched, _ = stepped(model, ids, pieces, mask)
        for row, count in enumerate(padding):
            alone, _ = stepped(model, ids[row : row + 1, count:], (13 - count,))
            assert zoo.difference(batched[row : row + 1, count:], alone) <= 1e-4


def test_forward_takes_padding_as_the_source_does() -> None:
    """forward numbers positions from 0 over the padding, as transformers does without position_ids."""
    model, ids = zoo.compiled("llama", "none"), zoo.tokens(2, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        actual = model(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        expected = zoo.source("llama")(ids, attention_mask=mask, position_ids=positions).logits[mask.bool()]
        bools = model(ids, attention_mask=mask.bool(), position_ids=positions).logits[mask.bool()]
    assert zoo.difference(actual, expected) <= 1e-5
    assert torch.equal(actual, bools)


@pytest.mark.parametrize("recipe", RECIPES[:3])
def test_the_state_has_the_same_size_at_every_length(recipe: str) -> None:
    model = zoo.compiled("llama", recipe)
    sizes = set()
    for length in (1, 5, 40):
        _, state = stepped(model, zoo.tokens(3, length), (length,))
        sizes.add((tuple(tuple(tensor.shape) for tensor in state.values()), state.nbytes))
    assert len(sizes) == 1
    assert sizes.pop()[1] == model.state_bytes(batch=3) == model.state_bytes(batch=3, context=10_000)


def test_state_bytes_of_a_window_is_its_formula() -> None:
    model = zoo.compiled("llama", "window{window=5,sinks=2}")
    layer = (5 + 2) * 2 * (8 + 8) * 4 + 5  # keys and values of ring and sinks at 2 kv heads, one bool a ring entry
    assert model.state_bytes(batch=3) == 3 * (2 * layer + 8) + 8  # seen [B] and offset int64


def test_a_kept_layer_among_others_steps_and_counts_its_cache_by_context() -> None:
    plan = zoo.compiled("llama", "lolcats{window=5}").plan
    kept = plan.entries[1].model_copy(update={"mixer": "keep", "options": {}})
    mixed = plan.model_copy(update={"entries": (plan.entries[0], kept)})
    model, ids = zoo.compile_again("llama", "lolcats", plan=mixed, tokens=0), zoo.tokens(2, 16)
    with torch.no_grad():
        whole = model(ids).logits
    for pieces in ((1,) * 16, (3, 13)):
        actual, state = stepped(model, ids, pieces)
        assert zoo.difference(actual, whole) <= 1e-4
        assert state.nbytes == model.state_bytes(batch=2, context=16)
    per_token = 2 * (8 + 8) * 4 + 1
    assert model.state_bytes(2, context=100) - model.state_bytes(2, context=0) == 2 * 100 * per_token
    assert [site.mixer.partition("{")[0] for site in model.report.sites] == ["lolcats", "keep"]


def test_a_window_of_the_whole_context_equals_the_source() -> None:
    ids = zoo.tokens(2, 30)
    for recipe in ("window{window=30}", "window{window=20,sinks=10}", "lolcats{window=30}"):
        with torch.no_grad():
            actual = zoo.compile_again("llama", recipe, tokens=0)(ids).logits
        assert zoo.difference(actual, zoo.source_logits("llama", ids)) <= 1e-4


def test_a_source_that_slides_stays_exact_whatever_the_recipe() -> None:
    model, ids = zoo.compiled("mistral", "lolcats{window=3}"), zoo.tokens(2, 30)
    with torch.no_grad():
        assert zoo.difference(model(ids).logits, zoo.source_logits("mistral", ids)) <= 1e-5
    assert [site.mixer for site in model.report.sites] == ["window{window=6}"] * 2
    actual, _ = stepped(model, ids, (1,) * 30)
    assert zoo.difference(actual, zoo.source_logits("mistral", ids)) <= 1e-4


def test_gradients_flow_through_the_compiled_model() -> None:
    model = zoo.compile_again("llama", "lizard{window=3}", tokens=0)
    ours = [parameter for name, parameter in model.named_parameters() if "linearize_mixers" in name]
    assert ours
    grads = torch.autograd.grad(model(zoo.tokens(2, 12)).logits.square().mean(), ours)
    assert all(bool(torch.isfinite(grad).all()) for grad in grads)
    assert any(bool((grad != 0).any()) for grad in grads)


# ---- limits and errors -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "nano_gpt", "opt", "position_parameter", "rotary_tables"])
def test_passing_the_learned_positions_is_a_state_error(name: str) -> None:
    model = zoo.compiled(name)
    with torch.no_grad():
        _, state = model.step(zoo.tokens(1, 63))
        _, state = model.step(zoo.tokens(1, 1), state)
        with pytest.raises(StateError, match="65 tokens pass the source's 64 learned positions"):
            model.step(zoo.tokens(1, 1), state)
        with pytest.raises(StateError, match="65 tokens pass the source's 64 learned positions"):
            model(zoo.tokens(1, 65))
        assert model(zoo.tokens(1, 64)).logits.shape[1] == 64


def test_a_model_with_a_site_that_looks_ahead_runs_whole_sequences_and_says_why_it_cannot_step() -> None:
    model = zoo.compiled("prefix")
    with pytest.raises(StateError, match=r"blocks.0.attn: scaled_dot_product_attention = .* looks ahead"):
        model.step(zoo.tokens(1, 3))
    assert model.report.refused[0].startswith("site 0 (blocks.0.attn)")


def test_a_state_of_another_batch_or_model_is_refused() -> None:
    model = zoo.compiled("llama", RECIPES[0])
    with torch.no_grad():
        _, state = model.step(zoo.tokens(2, 3))
    with pytest.raises(StateError, match=r"the state has batch 2, the tokens 3; use State.select"):
        model.step(zoo.tokens(3, 1), state)
    with pytest.raises(StateError, match="belongs to another model"):
        zoo.compiled("llama", "none").step(zoo.tokens(2, 1), state)


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (torch.tensor([[3, 97]]), r"token id 97 at row 0, position 1 is outside the vocabulary 0..96"),
        (torch.tensor([[3], [-1]]), r"token id -1 at row 1, position 0"),
        (torch.tensor([[0.5, 1.0]]), r"must be an integer tensor \[batch, length\], not \[1, 2\] torch.float32"),
        (torch.tensor([1, 2]), r"not \[2\] torch.int64"),
        (torch.zeros(1, 0, dtype=torch.int64), r"is empty: shape \[1, 0\]"),
        ([[1, 2]], "not list"),
    ],
)
def test_token_ids_that_make_no_sense_are_named(ids: object, message: str) -> None:
    model = zoo.compiled("llama", RECIPES[0])
    for call in (model.forward, model.step, model.generate):
        with pytest.raises(DataError, match=message):
            call(ids)  # type: ignore[arg-type]


def test_integers_of_other_widths_are_taken() -> None:
    model, ids = zoo.compiled("llama", "none"), zoo.tokens(1, 5)
    with torch.no_grad():
        assert torch.equal(model(ids.to(torch.int32)).logits, model(ids).logits)


def test_a_mask_of_another_shape_is_refused_and_one_of_all_tokens_is_cut() -> None:
    model, ids = zoo.compiled("llama", RECIPES[0]), zoo.tokens(1, 6)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1]])
    with torch.no_grad():
        _, state = model.step(ids[:, :4], None, mask[:, :4])
        whole, _ = model.step(ids[:, 4:], state, mask)
        new, _ = model.step(ids[:, 4:], state, mask[:, 4:])
        assert torch.equal(whole, new)
        with pytest.raises(DataError, match=r"attention_mask has shape \[1, 3\], input_ids \[1, 2\]"):
            model.step(ids[:, 4:], state, mask[:, :3])


# ---- State -----------------------------------------------------------------------------------------------------------


def test_a_state_forks_selects_and_prints() -> None:
    model, ids = zoo.compiled("llama", RECIPES[0]), zoo.tokens(3, 9)
    with torch.no_grad():
        _, state = model.step(ids)
        kept = state.clone()
        once, _ = model.step(ids[:, :1], state)
        again, _ = model.step(ids[:, :1], state)
        assert torch.equal(once, again)  # a step leaves the state that it was given as it was
        assert all(torch.equal(state[name], kept[name]) for name in state)
        rows = torch.tensor([2, 0, 2])
        selected, after = model.step(ids[rows][:, :1], state.select(rows))
        assert zoo.difference(selected, once[rows]) <= 1e-6
    assert (after.batch, after.tokens) == (3, 10)
    assert repr(state) == f"State(batch=3, tokens=9, tensors={len(state)}, bytes={state.nbytes})"
    with pytest.raises(StateError, match=r"rows \[0, 3\] are not all within the state's batch of 3"):
        state.select(torch.tensor([0, 3]))
    assert isinstance(State.empty(model.state_specs, 2, "cpu")["seen"], torch.Tensor)
