"""Prompts: the logits of the last token and the state are those of the whole graph, and the rest is not computed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from linearize.huggingface.cache import StateCache
from linearize.passes.lower.last_token import LastToken
from linearize.program import Program
from linearize.runtime.prompt_graph import PromptGraph
from linearize.verify import check_structure, shapes_at
from tests import zoo

RECIPE = "window{window=5}"
# plain, fused projections and learned positions, soft-capped logits, parallel blocks, experts, a head that cuts itself
NAMES = ("llama", "gpt2", "gemma2", "gpt_neox", "mixtral", "nano_gpt_last")


@pytest.mark.parametrize("name", [name for name in NAMES if name in zoo.BY_NAME])
@torch.no_grad()
def test_last_logits_and_state_are_those_of_the_whole_graph(name: str) -> None:
    model, ids, mask = zoo.compiled(name), zoo.tokens(2, 9), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :3] = 0
    whole, state = model.step(ids, attention_mask=mask)
    last, found = model.step(ids, attention_mask=mask, logits_to_keep=1)
    assert last.shape[1] == 1
    assert zoo.difference(last, whole[:, -1:]) < 1e-5
    assert all(torch.equal(found[name], state[name]) for name in state)


def rows_of_linears(program: Program, length: int) -> dict[str, int]:
    """The tokens that each linear layer computes, by the name of its weight."""
    shapes = shapes_at(program, 2, length)
    return {
        str(node.args[1].target): shapes[node][1]  # type: ignore[union-attr]
        for node in program.graph.nodes
        if node.target is torch.ops.aten.linear.default
    }


def test_of_the_last_layer_only_queries_keys_and_values_are_computed_for_all_tokens() -> None:
    program = zoo.compiled("llama", RECIPE).program
    prompt = LastToken().run(program)
    check_structure(prompt, "last_token")
    rows = rows_of_linears(prompt, 11)
    layers = sorted({name.split(".")[2] for name in rows if "layers" in name})
    last = [name for name in rows if f"layers.{layers[-1]}." in name or "layers" not in name]
    once = [name for name in last if name.split(".")[-2] not in ("q_proj", "k_proj", "v_proj")]
    assert "lm_head.weight" in once
    assert len(once) == 5
    assert {name for name, count in rows.items() if count == 1} == set(once)
    assert set(rows_of_linears(program, 11).values()) == {11}


def test_logits_that_are_returned_twice_are_cut_behind_and_counted_as_a_cost() -> None:
    program = zoo.compiled("llama", RECIPE).program
    module = program.copy_graph()
    output = next(iter(reversed(module.graph.nodes)))
    output.args = ([*output.args[0], output.args[0][0]],)
    module.recompile()
    twice = PromptGraph(program.replace(module=module))
    assert twice.vocab_size == program.vocab_size
    assert PromptGraph(program).vocab_size is None


@torch.no_grad()
def test_a_prompt_in_pieces_and_transformers_generate_use_it() -> None:
    model, ids = zoo.compiled("llama", RECIPE), zoo.tokens(2, 23)
    whole, _ = model.step(ids)
    logits, _ = model.prefill(ids)
    assert zoo.difference(logits, whole[:, -1]) < 1e-5
    seen: list[int] = []
    theirs = model.to_transformers()
    hook = theirs.get_submodule("lm_head").register_forward_hook(lambda _, args, out: seen.append(out.shape[1]))
    output = theirs(ids, past_key_values=StateCache(), logits_to_keep=1)
    generated = theirs.generate(ids, max_new_tokens=3, do_sample=False, eos_token_id=None)
    hook.remove()
    assert seen == [1] * 4
    assert zoo.difference(output.logits, whole[:, -1:]) < 1e-5
    assert torch.equal(generated, model.generate(ids, 3))


class Twice(nn.Module):
    """Stands for an adapter around a linear layer."""

    def __init__(self, base: nn.Module) -> None:
        super().__init__()
        self.base = base

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.base(x)


@torch.no_grad()
def test_adapters_put_in_after_the_first_prompt_count() -> None:
    theirs, ids = copy.deepcopy(zoo.compiled("llama", RECIPE)).to_transformers(), zoo.tokens(1, 7)
    before = theirs(ids, logits_to_keep=1).logits
    theirs.lm_head = Twice(theirs.lm_head)
    assert zoo.difference(theirs(ids, logits_to_keep=1).logits, 2 * before) < 1e-6
