"""Memory does not grow with the context: prompts in pieces, generation, states that are saved and forked."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch

from linearize.errors import StateError
from linearize.huggingface.model import LinearizedForCausalLM
from linearize.runtime.generate import LOGITS_OF_A_PIECE, PREFILL_PIECE, Sampling, prompt_pieces, stream
from linearize.runtime.state import State
from tests import zoo

RECIPE = "lolcats{window=5}"


def live_bytes() -> int:
    """Bytes of all tensors of this process, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type == "cpu":
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def test_generation_holds_the_same_memory_at_every_token() -> None:
    model = zoo.compiled("llama", RECIPE)
    found = []
    for count, _ in enumerate(stream(model, zoo.tokens(2, 7), 600, Sampling()), 1):
        if count in (100, 300, 600):
            found.append(live_bytes())
    assert len(set(found)) == 1


def test_the_count_of_live_bytes_sees_a_cache_that_grows() -> None:
    model, found = zoo.compiled("llama", "none"), []
    for count, _ in enumerate(stream(model, zoo.tokens(2, 7), 60, Sampling()), 1):
        if count in (20, 60):
            found.append(live_bytes())
    per_token = 2 * 2 * (2 * (8 + 8) * 4 + 1)  # rows, layers, keys and values at 2 kv heads, the mask
    assert found[1] - found[0] == 40 * per_token


def test_pieces_of_a_prompt_are_bounded_by_tokens_and_by_logits() -> None:
    pieces = prompt_pieces(5000, 1, 1024)
    assert [(piece.start, piece.stop) for piece in pieces] == [(0, 2048), (2048, 4096), (4096, 5000)]
    assert prompt_pieces(100, 1, None) == [slice(0, 100)]
    large = prompt_pieces(100_000, 8, 150_000)
    assert max(piece.stop - piece.start for piece in large) * 8 * 150_000 <= LOGITS_OF_A_PIECE
    assert large[-1].stop == 100_000
    assert len(prompt_pieces(3, 10**6, 10**6)) == 3
    assert PREFILL_PIECE == 2048


def test_a_state_is_saved_forked_and_continued_elsewhere(tmp_path: Path) -> None:
    model, ids = zoo.compiled("llama", RECIPE), zoo.tokens(1, 19)
    _, state = model.prefill(ids[:, :12])
    state.save(tmp_path / "prompt.safetensors")
    loaded = model.load_state(tmp_path / "prompt.safetensors")
    assert (loaded.tokens, loaded.batch, loaded.nbytes) == (12, 1, state.nbytes)
    for end in (13, 19):
        expected = model.generate(ids[:, :end], 6)[:, 12:]
        assert torch.equal(model.generate(ids[:, 12:end], 6, state=loaded), expected)
    three = model.generate(ids[:, 12:].repeat(3, 1), 6, state=loaded.repeat(3))
    assert torch.equal(three, model.generate(ids, 6)[:, 12:].repeat(3, 1))


def test_a_state_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    model: Any = zoo.compiled("llama", RECIPE)
    path = tmp_path / "state.safetensors"
    _, state = model.prefill(zoo.tokens(1, 4))
    state.save(path)
    with pytest.raises(StateError, match=r"is the state of another model: layers_0_ring_k is .* not torch.float32 \[7"):
        zoo.compiled("llama", "lolcats{window=7}").load_state(path)
    with pytest.raises(StateError, match="it lacks layers_0_cache_k"):
        zoo.compiled("llama", "none").load_state(path)
    path.write_bytes(b"nonsense")
    with pytest.raises(StateError, match="cannot read the state"):
        State.load(path, model.state_specs)
    with pytest.raises(StateError, match="cannot read the state"):
        model.load_state(tmp_path / "missing")
    from safetensors.torch import save_file

    save_file({"seen": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(StateError, match="is no saved state"):
        model.load_state(tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["llama", "position_parameter", "nano_gpt"])
def test_decoding_does_not_wait_for_the_device_to_which_a_model_has_moved(name: str) -> None:
    """On the meta device a value cannot be read, so whatever would wait raises, as does a constant left on the CPU."""
    model = copy.deepcopy(zoo.compiled(name, RECIPE))
    _, state = model.prefill(zoo.tokens(2, 4))
    meta = model.to("meta")
    logits, after = meta.decode(torch.zeros(2, dtype=torch.int64, device="meta"), state.to("meta"))
    assert (logits.shape, after.tokens, logits.device.type) == ((2, zoo.VOCAB), 5, "meta")


def test_a_transformers_model_moves_with_its_constants() -> None:
    model = LinearizedForCausalLM.of(copy.deepcopy(zoo.compiled("nano_gpt", RECIPE))).to("meta")
    ids = torch.zeros(1, 5, dtype=torch.int64, device="meta")
    logits, _ = model.engine.call(model._graph, ids, torch.ones_like(ids), ids, model.engine.empty(1, model.device))
    assert logits.device.type == "meta"
