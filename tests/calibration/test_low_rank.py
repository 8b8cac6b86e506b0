"""SVD-LLM: what truncation costs, on examples worked by hand and on models, and what is left of a model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig

import linearize
from linearize.calibration.low_rank import choose_ranks, input_grams, whitened_factors, whitened_svd
from linearize.calibration.teacher import TeacherStream
from linearize.errors import RecipeError
from linearize.passes.rewrite import LowerRank, RaiseAttention
from linearize.passes.rewrite.lower_rank import every_product, products
from linearize.pipeline import run_pipeline
from linearize.plan import LowRankEntry
from linearize.recipe import LowRank, Recipe
from linearize.rewriting.walk import attribute
from tests import zoo

UP = "model.layers.0.mlp.up_proj.weight"

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2,
}  # fmt: skip


def data(length: int = 40) -> list[Tensor]:
    return [zoo.tokens(2, length), zoo.tokens(2, length, seed=1)]


def test_whitening_keeps_the_direction_that_the_inputs_take() -> None:
    """W = diag(3, 2), inputs (1, 0) once and (0, 3) once: X X^T = diag(1, 9), W S = diag(3, 6). Of rank 1 the second is
    left, at a cost of 3; a plain SVD would leave the first, at a cost of 2 x 3 = 6."""
    weight, gram = torch.diag(torch.tensor([3.0, 2.0])).double(), torch.diag(torch.tensor([1.0, 9.0])).double()
    a, b = whitened_svd(weight, gram, 1)
    torch.testing.assert_close(a @ b, torch.diag(torch.tensor([0.0, 2.0])).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_the_error_is_that_of_the_singular_values_left_out_and_below_a_plain_svds(rank: int) -> None:
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(8, 8, generator=generator).double() @ torch.randn(8, 50, generator=generator).double()
    weight = torch.randn(6, 8, generator=generator).double()
    a, b = whitened_svd(weight, x @ x.T, rank)
    sigma = torch.linalg.svdvals(weight @ torch.linalg.cholesky(x @ x.T))
    error = (weight @ x - a @ (b @ x)).norm()
    torch.testing.assert_close(error, sigma[rank:].norm(), rtol=1e-5, atol=0)
    u, s, vt = torch.linalg.svd(weight)
    assert error < (weight @ x - (u[:, :rank] * s[:rank]) @ vt[:rank] @ x).norm()
    assert a.shape == (6, rank)
    assert b.shape == (rank, 8)


def test_grams_are_those_of_all_tokens() -> None:
    program = zoo.captured("llama")
    product = next(found for found in products(program.module) if found.parameter == UP)
    gram = input_grams(program, {product.x}, data())[product.x]
    stream = TeacherStream(program, data())
    rows = torch.cat([stream.values([product.x.name], batch)[0].flatten(0, 1) for batch in (0, 1)]).double()
    torch.testing.assert_close(gram, rows.T @ rows)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_at_full_rank_it_is_the_same_model_whatever_form_its_products_have(family: str) -> None:
    program, ids = run_pipeline(zoo.captured(family), [RaiseAttention()]), zoo.tokens(2, 9)
    names = [product.parameter for product in products(program.module)]
    assert len(names) >= 4 * len(program.matched)
    entries = [
        LowRankEntry(weight=name, rank=min(attribute(program.module, name).shape)) for name in dict.fromkeys(names)
    ]
    lowered = run_pipeline(program, [LowerRank(whitened_factors(program, entries, data()))])
    expected, found = (TeacherStream(each, [ids]).logits(0) for each in (program, lowered))
    assert zoo.difference(found, expected) < 2e-3
    assert not any(str(node.target) in names for node in lowered.graph.nodes)


def test_ranks_leave_at_most_the_share_of_the_numbers_and_not_the_output_projection() -> None:
    program = zoo.captured("llama")
    for of, parts in (("all", 7), ("attention", 4), ("key_value", 2)):
        entries = choose_ranks(program, LowRank(keep=0.5, of=of))
        assert len(entries) == parts * len(program.matched)
        for entry in entries:
            out, width = attribute(program.module, entry.weight).shape
            assert 0 < entry.rank * (out + width) <= 0.5 * out * width
            assert (entry.rank + 1) * (out + width) > 0.5 * out * width


def test_the_recipe_shrinks_the_weights_and_is_saved_and_runs_in_steps(tmp_path: Path) -> None:
    ids = zoo.tokens(2, 12)
    plain = zoo.compiled("llama")
    compiled = zoo.compile_again("llama", Recipe.load("svd-llm{keep=0.5}"), calibration=data())
    assert parameters(compiled) < 0.75 * parameters(plain)
    assert compiled.state_bytes(1, 100) == plain.state_bytes(1, 100)
    compiled.save_pretrained(tmp_path / "saved")
    again = linearize.load(tmp_path / "saved")
    assert again.plan.low_rank == compiled.plan.low_rank
    with torch.no_grad():
        whole = compiled(ids).logits
        first, state = compiled.step(ids[:, :5])
        second, _ = compiled.step(ids[:, 5:], state)
        assert torch.equal(again(ids).logits, whole)
    assert zoo.difference(torch.cat([first, second], 1), whole) < 1e-4
    stored = sum(file.stat().st_size for file in (tmp_path / "saved").glob("*.safetensors"))
    plain.save_pretrained(tmp_path / "plain")
    assert stored < 0.75 * sum(file.stat().st_size for file in (tmp_path / "plain").glob("*.safetensors"))


def parameters(model: linearize.LinearizedModel) -> int:
    return sum({id(p): p.numel() for p in model.source.module.parameters()}.values())


@pytest.mark.parametrize(
    ("weight", "rank", "reason"),
    [
        ("model.layers.9.mlp.up_proj.weight", 2, "no weight of a product"),
        ("model.norm.weight", 1, "no weight of a product"),
        (UP, 10_000, "has no rank 10000"),
    ],
)
def test_weights_and_ranks_that_are_not_there_are_refused(weight: str, rank: int, reason: str) -> None:
    program = zoo.captured("llama")
    with pytest.raises(RecipeError, match=reason):
        whitened_factors(program, [LowRankEntry(weight=weight, rank=rank)], data())


def test_a_weight_that_the_embedding_shares_is_left_alone() -> None:
    source = type(zoo.source("llama"))(LlamaConfig(**SMALL, tie_word_embeddings=True)).eval()
    program = linearize.capture(source)
    last = every_product(program.graph)[-1].parameter
    assert attribute(program.module, last) is source.model.embed_tokens.weight
    assert last not in {product.parameter for product in products(program.module)}
    with pytest.raises(RecipeError, match="read elsewhere too"):
        LowerRank({last: (torch.ones(2, 1), torch.ones(1, 2))}).run(program)
    assert len(choose_ranks(program, LowRank(keep=0.5))) == 7
