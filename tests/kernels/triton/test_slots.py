"""The Triton kernel of `slots_block` in the honest interpreter."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings

from linearize.kernels.triton import slots
from linearize.ops.slots_block import slots_block_decomposed
from tests.kernels.triton.checking import assert_equals_truth, doubled, interpreted, rms
from tests.ops.test_slots_block import blocks, draw_slots


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(blocks())
def test_it_equals_the_truth(call):
    args, keywords = call
    o, lse = interpreted(lambda: slots.slots_block(*args, **keywords), orders=(0,))
    expected_o, expected_lse = slots_block_decomposed(*doubled(args), **keywords)
    assert torch.equal(lse == float("-inf"), expected_lse == float("-inf"))
    assert_equals_truth((o, lse.clamp(min=-1e30)), (expected_o, expected_lse.clamp(min=-1e30)), args[0].dtype)


def inputs(window=40, length=40, count=50, dims=(24, 40)):
    generator = torch.Generator().manual_seed(3)
    q = torch.randn(2, length, 4, dims[0], generator=generator).double()
    k, v = (torch.randn(2, window + length, 2, dim, generator=generator).double() for dim in dims)
    return q, k, v, *draw_slots(generator, torch.float64, 2, 2, count, dims, empty=7)


def test_the_order_of_the_programs_does_not_show():
    args = inputs()
    found = interpreted(lambda: slots.slots_block(*args, window=40, scale=0.2))
    assert_equals_truth(found, slots_block_decomposed(*args, window=40, scale=0.2), torch.float64)


def test_bfloat16_errs_at_most_twice_as_much_as_sdpa_on_bfloat16_does():
    q, k, v, slot_k, slot_v, slot_n = (x.bfloat16() for x in inputs())
    o, _ = interpreted(lambda: slots.slots_block(q, k, v, slot_k, slot_v, slot_n, window=40, scale=0.2), orders=(0,))
    expected = slots_block_decomposed(*(x.double() for x in (q, k, v, slot_k, slot_v, slot_n)), window=40, scale=0.2)[0]
    keys, values = torch.cat([slot_k, k.transpose(1, 2)], 2), torch.cat([slot_v, v.transpose(1, 2)], 2)
    seen = torch.arange(80) <= torch.arange(40)[:, None] + 40
    near = torch.where(seen, 0.0, float("-inf")).expand(2, 2, -1, -1)
    bias = torch.cat([slot_n.float().log()[:, :, None].expand(-1, -1, 40, -1), near], -1).repeat_interleave(2, 1)
    eager = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), keys, values, attn_mask=bias.bfloat16(), scale=0.2, enable_gqa=True
    )
    assert rms(o, expected) < 2 * rms(eager.transpose(1, 2), expected)
