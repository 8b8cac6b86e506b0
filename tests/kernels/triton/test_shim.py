"""Each part of the shim catches a bug that the bare interpreter does not see."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from linearize.kernels.triton import _launch
from linearize.kernels.triton._config import Config
from tests.kernels.triton.shim import GuardError, honest, narrow, round_to_tf32, widen

ONE = (Config(4, 1),)


def run(kernel, grid, *args, **constants):
    _launch.launch(kernel, lambda config: grid, args, constants, ONE)


@triton.jit
def add_kernel(x, y, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i) + tl.load(y + i))


@triton.jit
def cast_kernel(x, out, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + i, tl.load(x + i).to(out.dtype.element_ty))


@triton.jit
def dot_kernel(x, y, out, SIZE: tl.constexpr, PRECISION: tl.constexpr):
    i = tl.arange(0, SIZE)
    place = i[:, None] * SIZE + i[None, :]
    tl.store(out + place, tl.dot(tl.load(x + place), tl.load(y + place), input_precision=PRECISION))


@triton.jit
def carry_kernel(sums, SIZE: tl.constexpr):
    """A race: program i adds what program i - 1 wrote."""
    i = tl.program_id(0)
    tl.store(sums + i + 1, tl.load(sums + i) + 1)


@triton.jit
def shift_kernel(x, out, read_from, write_to, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out + write_to + i, tl.load(x + read_from + i))


@triton.jit
def row_sum_kernel(x, out, stride, SIZE: tl.constexpr):
    i = tl.arange(0, SIZE)
    tl.store(out, tl.sum(tl.load(x + i * stride), 0))


def wrong_and_right(call):
    """What a call gives in the bare interpreter, then in the honest one."""
    bare = call()
    with honest():
        return bare, call()


def test_bfloat16_arithmetic_is_that_of_numbers():
    x, y = torch.randn(2, 64).bfloat16()

    def call():
        out = torch.zeros_like(x)
        run(add_kernel, (1,), x, y, out, SIZE=64)
        return out

    bare, found = wrong_and_right(call)
    assert torch.equal(found, x + y)
    assert not torch.equal(bare, x + y)


def test_a_cast_to_bfloat16_rounds_to_nearest_even():
    x = torch.cat([torch.randn(60), torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, float("inf"), float("nan")])])

    def call():
        out = torch.zeros(64, dtype=torch.bfloat16)
        run(cast_kernel, (1,), x, out, SIZE=64)
        return out

    bare, found = wrong_and_right(call)
    torch.testing.assert_close(found, x.bfloat16(), rtol=0, atol=0, equal_nan=True)
    assert not torch.equal(bare[:60], x[:60].bfloat16())


def test_products_of_bfloat16_are_those_of_numbers():
    x, y = torch.randn(2, 16, 16).bfloat16()

    def call():
        out = torch.zeros(16, 16)
        run(dot_kernel, (1,), x, y, out, SIZE=16, PRECISION="ieee")
        return out

    bare, found = wrong_and_right(call)
    torch.testing.assert_close(found, x.float() @ y.float())
    assert not torch.allclose(bare, x.float() @ y.float(), rtol=0.1)


@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_tf32_products_lose_digits_and_ieee_products_do_not(precision):
    x, y = torch.randn(2, 16, 16)

    def call():
        out = torch.zeros(16, 16)
        run(dot_kernel, (1,), x, y, out, SIZE=16, PRECISION=precision)
        return out

    bare, found = wrong_and_right(call)
    rounded = [torch.from_numpy(round_to_tf32(z.numpy())) for z in (x, y)]
    torch.testing.assert_close(bare, x @ y)
    torch.testing.assert_close(found, rounded[0] @ rounded[1] if precision == "tf32" else x @ y)
    assert torch.allclose(found, x @ y, rtol=1e-6, atol=1e-6) == (precision == "ieee")


def test_a_race_shows_in_a_shuffled_order():
    def call():
        sums = torch.zeros(9, dtype=torch.int32)
        run(carry_kernel, (8,), sums, SIZE=8)
        return sums

    bare, found = wrong_and_right(call)
    assert bare.tolist() == list(range(9))
    assert found.tolist() != list(range(9))


def test_every_program_of_a_shuffled_grid_runs_once():
    @triton.jit
    def count_kernel(counts, ny, nz):
        place = (tl.program_id(0) * ny + tl.program_id(1)) * nz + tl.program_id(2)
        tl.store(counts + place, tl.load(counts + place) + 1)

    counts = torch.zeros(2 * 3 * 5, dtype=torch.int32)
    with honest(seed=3):
        run(count_kernel, (2, 3, 5), counts, 3, 5)
    assert counts.tolist() == [1] * 30


def test_reading_out_of_bounds_gives_nan():
    store = torch.ones(100)

    def call():
        out = torch.zeros(16)
        run(shift_kernel, (1,), store[:16], out, 1, 0, SIZE=16)
        return out

    bare, found = wrong_and_right(call)
    assert bare.tolist() == [1.0] * 16
    assert found[15].isnan()


def test_reading_between_the_rows_of_a_view_gives_nan():
    view = torch.ones(4, 6)[:, :3]

    def call(stride):
        out = torch.zeros(1)
        run(row_sum_kernel, (1,), view, out, stride, SIZE=4)
        return out.item()

    assert call(5) == 4
    with honest():
        assert call(6) == 4
        assert call(5) != call(5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_writing_out_of_bounds_is_an_error(dtype):
    store = torch.zeros(100, dtype=dtype)
    run(shift_kernel, (1,), torch.zeros(16, dtype=dtype), store[:16], 0, 1, SIZE=16)
    with honest(), pytest.raises(GuardError, match="shift_kernel: written outside a tensor"):
        run(shift_kernel, (1,), torch.zeros(16, dtype=dtype), store[:16], 0, 1, SIZE=16)


def test_the_conversions_are_those_of_torch():
    x = torch.randn(1000) * torch.tensor(10.0) ** torch.randint(-30, 30, (1000,))
    assert torch.equal(torch.from_numpy(widen(narrow(x.numpy()))), x.bfloat16().float())


def test_reducing_bfloat16_is_refused():
    with honest(), pytest.raises(Exception, match="reduces bfloat16"):
        run(row_sum_kernel, (1,), torch.ones(4).bfloat16(), torch.zeros(1).bfloat16(), 1, SIZE=4)


def test_the_interpreter_is_itself_again_afterwards():
    with honest():
        pass
    x, y = torch.randn(2, 64).bfloat16()
    out = torch.zeros_like(x)
    run(add_kernel, (1,), x, y, out, SIZE=64)
    assert not torch.equal(out, x + y)
