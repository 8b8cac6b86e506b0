"""Tensors read from safetensors files one by one, and the key that tells one model from another."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import linearize
from linearize.calibration.keys import model_key
from linearize.tensorfile import OWN_PAGES, read_header, read_tensor
from tests import zoo


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_a_large_tensor_is_read_as_it_was_written_and_is_its_own(tmp_path: Path, dtype: torch.dtype) -> None:
    rows = 2 * OWN_PAGES // (64 * dtype.itemsize) + 1
    written = (torch.randn(rows, 64, generator=torch.Generator().manual_seed(0)) * 9).to(dtype)
    small = torch.ones(3).to(dtype)
    save_file({"large": written, "small": small, "empty": torch.zeros(0, 4, dtype=dtype)}, tmp_path / "a.safetensors")
    stored = read_header(tmp_path / "a.safetensors")[0]
    assert stored["large"].nbytes >= OWN_PAGES
    for name, expected in (("large", written), ("small", small)):
        first, second = read_tensor(stored[name]), read_tensor(stored[name])
        assert first.dtype == dtype
        assert torch.equal(first, expected)
        first.zero_()
        assert torch.equal(second, expected)
    assert read_tensor(stored["empty"]).shape == (0, 4)


def test_a_key_knows_a_single_number_that_it_does_not_sample() -> None:
    model = zoo.BY_NAME["nano_gpt"].build()
    program = linearize.capture(model)
    weight = max(model.parameters(), key=torch.numel)
    before = model_key(program)
    assert model_key(program) == before
    with torch.no_grad():  # two bytes of one number change places
        number = weight.view(torch.uint8).view(-1, 4)[257]
        number[:2] = number[:2].flip(0).clone()
    assert number[0] != number[1]
    assert model_key(program) != before
