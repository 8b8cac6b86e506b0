"""Who claims a call on a GPU, and with which reason the others decline. Nothing is launched."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from linearize.kernels import choose, kernels_for, triton
from linearize.ops import OPERATORS


def tokens(length=3, dtype=torch.bfloat16, dim=8, heads=2):
    return torch.empty(1, length, heads, dim, dtype=dtype, device="meta")


def chosen(op, *args, **keywords):
    kernel, declined = choose(op, "cuda", args, keywords)
    return kernel.name, dict(declined)


@pytest.mark.parametrize("op", ["gla_chunk", "gla_vec_chunk", "hybrid_chunk", "delta_chunk"])
def test_the_triton_kernel_is_asked_first_and_declines_with_a_reason(op):
    kernel = f"triton.{op}"
    mask = torch.empty(1, 3, device="meta", dtype=torch.bool)
    assert chosen(op, *[tokens()] * 3, mask)[0] == kernel
    wide = [tokens(dtype=torch.float64)] * 3
    name, declined = chosen(op, *wide, mask)
    assert name.startswith("torch.")
    assert declined[kernel] == "torch.float64: Triton kernels accumulate in float32"
    mixed = chosen(op, tokens(), tokens(), tokens(dtype=torch.float32), mask)[1][kernel]
    assert mixed == "q, k and v are torch.bfloat16, torch.bfloat16 and torch.float32"


def test_no_tokens_and_wide_heads_are_declined():
    assert triton.check_tokens(*[tokens(length=0)] * 3) == "T is 0"
    assert triton.check_line(*[tokens(dim=320)] * 3) == "head dim 320, at most 256"


def test_without_triton_plain_pytorch_runs_and_says_so(monkeypatch):
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda name: None)
    triton.missing.cache_clear()
    try:
        name, declined = chosen("gla_chunk", *[tokens()] * 3)
        assert name == "torch.gla_stream"
        assert declined["triton.gla_chunk"] == "triton is not installed: pip install 'linearize[gpu]'"
    finally:
        triton.missing.cache_clear()


def test_every_operator_has_an_implementation_on_a_gpu_that_is_linear_in_the_length():
    for op, operator in OPERATORS.items():
        if operator.composed is not operator.reference:
            continue  # it calls other operators of ours
        plain = [kernel for kernel in kernels_for(op, "cuda") if not kernel.name.startswith(("triton.", "fla."))]
        assert plain or op in REFERENCE_IS_ENOUGH, op


# One token, one block, block by block or a short convolution: their references hold nothing quadratic.
REFERENCE_IS_ENOUGH = {
    "gla_step", "gla_vec_step", "delta_step", "hybrid_step", "mla_decode", "slots_block", "slots_merge", "slots_chunk",
    "evict_chunk", "short_conv",
}  # fmt: skip


def test_importing_the_kernels_does_not_import_triton():
    code = "import sys, linearize.kernels; print('triton' in sys.modules)"
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.split() == ["False"]
