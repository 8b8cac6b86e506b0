"""Projections are named by parameter and rows, each proved by value; what cannot be proved is not claimed."""

import pytest
import torch

import linearize
from linearize.passes.match.projections import apply_projection
from linearize.spec import Projection
from tests import plain_models as plain
from tests import zoo

WEIGHT = "blocks.0.attn."


def claims(name: str) -> dict[str, Projection]:
    return {claim.role: claim for claim in zoo.captured(name).matched[0].projected}


@pytest.mark.parametrize(
    ("name", "query", "key", "value"),
    [
        ("transposed_weights", ((0, 32),), ((32, 64),), ((64, 96),)),
        ("interleaved_by_head", ((0, 8), (24, 32), (48, 56), (72, 80)), ((8, 16), (32, 40), (56, 64), (80, 88)),
         ((16, 24), (40, 48), (64, 72), (88, 96))),
        ("interleaved_by_group", ((0, 16), (32, 48)), ((16, 24), (48, 56)), ((24, 32), (56, 64))),
        ("by_shard", ((0, 16), (48, 64)), ((32, 48), (80, 96)), ((16, 32), (64, 80))),
        ("torch_multihead", ((0, 32),), ((32, 64),), ((64, 96),)),
        ("complex_rotary", ((0, 32),), ((0, 16),), ((0, 16),)),
        ("parallel_fused", ((0, 32),), ((32, 40),), ((40, 48),)),
    ],
)  # fmt: skip
def test_rows_of_a_fused_weight_are_found(name: str, query: object, key: object, value: object) -> None:
    found = claims(name)
    assert [found[role].rows for role in ("query", "key", "value")] == [query, key, value]
    assert found["output"].rows == ()


def test_transposed_weights_biases_and_adapters_are_named() -> None:
    conv = claims("transposed_weights")["query"]
    assert (conv.parameter, conv.bias, conv.transposed) == (
        WEIGHT + "c_attn.weight", WEIGHT + "c_attn.bias", True
    )  # fmt: skip
    assert str(conv) == f"query: {WEIGHT}c_attn.weight columns 0-31 + {WEIGHT}c_attn.bias"
    lora = claims("adapted")
    assert lora["query"].adapter == (WEIGHT + "q_proj.lora_A.weight", WEIGHT + "q_proj.lora_B.weight")
    assert lora["query"].adapter_scale == 2.0
    assert lora["key"].adapter == ()


def test_a_claim_computes_what_the_source_computes() -> None:
    program, claim = zoo.captured("interleaved_by_group"), claims("interleaved_by_group")["key"]
    x = torch.randn(2, 5, plain.WIDTH)
    module = zoo.source("interleaved_by_group").blocks[0].attn  # type: ignore[index,union-attr]
    rows = torch.cat([torch.arange(first, stop) for first, stop in claim.rows])
    with torch.no_grad():
        expected = module.attn(x).view(2, 5, 2, 4, 8)[:, :, :, 2].flatten(2)
    assert torch.allclose(apply_projection(program.module, claim, x)[..., rows], expected, atol=1e-6)


def test_a_projection_in_two_stages_is_not_claimed() -> None:
    assert set(claims("shared_rotary_key")) == {"query", "value", "output"}  # keys: low-rank and rotated parts


def test_without_values_nothing_is_claimed() -> None:
    with torch.device("meta"):
        model = plain.LearnedPositions(plain.FusedSDPA).eval()
    (site,) = linearize.capture(model).sites
    assert site.matched
    assert site.projected == ()
    assert site.projections == (WEIGHT + "c_attn.weight", WEIGHT + "c_proj.weight")


@pytest.mark.parametrize(
    ("name", "positions", "extras"),
    [
        ("complex_rotary", "rope", {"gqa"}),
        ("alibi_manual", "alibi", {"alibi"}),
        ("post_norm", "learned", {"fused-qkv"}),
        ("tutorial_transformer", "fixed", {"fused-qkv"}),
        ("one_hot_tokens", "none", set()),
        ("norm_after_rotary", "unknown", {"gqa"}),
        ("gated_qk_norm", "learned", {"output-gate", "qk-norm"}),
        ("norm_after_core", "learned", {"output-norm"}),
        ("parallel_block", "learned", {"parallel-block"}),
        ("nano_gpt", "learned", {"fused-qkv"}),
    ],
)
def test_positions_gates_and_norms_are_told(name: str, positions: str, extras: set[str]) -> None:
    site = zoo.captured(name).matched[0]
    assert site.positions == positions
    told = {"output-gate", "output-norm", "parallel-block"}
    assert extras <= set(site.extras)
    assert told & set(site.extras) == told & extras
