"""CPU kernels: who claims which call, and what they must not do to memory. Their values are tested in tests/ops."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from linearize.kernels import choose
from linearize.kernels.cpu import attention as cpu_attention
from linearize.kernels.cpu import delta as cpu_delta
from linearize.kernels.cpu import gla as cpu_gla
from linearize.kernels.cpu import gla_vec as cpu_gla_vec
from linearize.kernels.cpu import hybrid as cpu_hybrid
from linearize.ops import OPERATORS


class LargestTensor(TorchDispatchMode):
    """Records the most elements that one tensor made inside the block has."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [
            x.untyped_storage().nbytes() // x.element_size() for x in tree_leaves(out) if isinstance(x, torch.Tensor)
        ]
        self.elements = max([self.elements, *sizes])
        return out


def name_of(kernel_and_declined):
    kernel, declined = kernel_and_declined
    return kernel.name, declined[0][1] if declined else ""


@pytest.mark.parametrize(
    ("keywords", "sinks", "value_dim", "kernel", "reason"),
    [
        ({"causal": True}, None, 8, "cpu.sdpa", ""),
        ({"softcap": 5.0}, None, 8, "cpu.attention_blocks", "SDPA has no soft-cap"),
        ({}, torch.zeros(2), 8, "cpu.attention_blocks", "SDPA has no sink logits"),
        ({}, None, 6, "cpu.attention_blocks", "SDPA is not fused for head dims 8 and 6"),
        ({"window": 9}, None, 8, "cpu.attention_blocks", "a mask of 1100 x 1100 is larger than 1048576"),
    ],
)
def test_attention_goes_to_sdpa_where_sdpa_computes_the_same(keywords, sinks, value_dim, kernel, reason):
    q, v = torch.randn(1, 2, 1100, 8), torch.randn(1, 2, 1100, value_dim)
    assert name_of(choose("attention", "cpu", (q, q, v, None, sinks), {"scale": 1.0, **keywords})) == (kernel, reason)


LONG = 1000
Q, LINE = torch.randn(1, LONG, 2, 8), torch.randn(1, LONG + 16, 2, 8)
QUARTER = Q[..., :2]  # the dense form holds T x T x K
CALLS = {
    "attention": ((Q.transpose(1, 2),) * 3, {"scale": 0.3, "causal": True, "window": 20}, cpu_attention.blocks),
    "gla_chunk": ((Q, Q, Q, -Q[..., 0].exp()), {}, cpu_gla.stream),
    "gla_vec_chunk": ((QUARTER, QUARTER, QUARTER, -QUARTER.exp()), {}, cpu_gla_vec.stream),
    "delta_chunk": ((Q, Q, Q, Q[..., 0].sigmoid(), -Q[..., 0].exp()), {"l2norm": True}, cpu_delta.stream),
    "hybrid_chunk": ((Q, LINE, LINE, LINE[..., 0, 0] > -9, Q, Q), {"window": 16, "scale": 0.3}, cpu_hybrid.stream),
}


@pytest.mark.parametrize("op", CALLS)
def test_no_kernel_holds_a_tensor_quadratic_in_the_length(op):
    args, keywords, kernel = CALLS[op]
    with LargestTensor() as streamed:
        kernel(*args, **keywords)
    with LargestTensor() as dense:
        OPERATORS[op].reference(*args, **keywords)
    assert streamed.elements < LONG * LONG / 8
    assert dense.elements > LONG * LONG


@pytest.mark.parametrize("blocks", [1, 7, 128])
def test_the_block_size_does_not_change_attention(monkeypatch, blocks):
    monkeypatch.setattr(cpu_attention, "BLOCK_ROWS", blocks)
    q, k, bias = torch.randn(2, 4, 50, 8).double(), torch.randn(2, 2, 57, 8).double(), torch.randn(50, 57).double()
    found = cpu_attention.blocks(q, k, k, bias, scale=0.3, causal=True, window=20)
    torch.testing.assert_close(found, cpu_attention.sdpa(q, k, k, bias, scale=0.3, causal=True, window=20))


@pytest.mark.parametrize("chunk", [1, 7, 64])
def test_the_chunk_size_does_not_change_hybrid(monkeypatch, chunk):
    q, line = torch.randn(2, 50, 4, 8).double(), torch.randn(2, 59, 2, 8).double()
    args = q, line, line, torch.rand(2, 59) > 0.5, q.exp(), line[:, :50].exp()
    expected = cpu_hybrid.stream(*args, window=9, scale=0.3)
    monkeypatch.setattr(cpu_hybrid, "CHUNK", chunk)
    for a, b in zip(cpu_hybrid.stream(*args, window=9, scale=0.3), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_a_batch_is_its_rows_one_by_one():
    q, g = torch.randn(3, 40, 2, 8).double(), -torch.rand(3, 40, 2).double()
    together = cpu_gla.stream(q, q, q, g)
    for row in range(3):
        for a, b in zip(cpu_gla.stream(*(x[row : row + 1] for x in (q, q, q, g))), together, strict=True):
            torch.testing.assert_close(a, b[row : row + 1])
