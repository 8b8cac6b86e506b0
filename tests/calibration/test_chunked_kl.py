"""KL over chunks of the vocabulary: the plain one's value and gradients, without a tensor of [tokens, vocabulary]."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from linearize.calibration.chunked_kl import Head, chunked_kl

N, D, V = 24, 6, 101


def soft_cap(x: Tensor) -> Tensor:
    return torch.tanh(x / 3.0) * 3.0


def given(
    dtype: torch.dtype = torch.float32, bias: bool = False, after: Any = None
) -> tuple[Tensor, Tensor, Head, Head]:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, grad: bool = False) -> Tensor:
        return (2 * torch.randn(*shape, generator=generator)).to(dtype).requires_grad_(grad)

    heads = [Head(draw(V, D, grad=mine), draw(V, grad=mine) if bias else None, after) for mine in (True, False)]
    return draw(N, D, grad=True), draw(N, D), heads[0], heads[1]


def plain(student: Tensor, teacher: Tensor, head: Head, expected: Head) -> Tensor:
    ours, theirs = (one.logits(h, 0, V).log_softmax(-1) for one, h in ((head, student), (expected, teacher)))
    return (theirs.exp() * (theirs - ours)).sum(-1).mean()


@pytest.mark.parametrize("chunk", [1, 7, 100, 101, 500])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("after", [None, soft_cap])
def test_value_and_gradients_are_those_of_the_plain_divergence(chunk: int, bias: bool, after: Any) -> None:
    values = given(bias=bias, after=after)
    wanted = [values[0], *(tensor for tensor in values[2][:2] if tensor is not None)]
    actual, expected = chunked_kl(*values, chunk=chunk), plain(*values)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    ours, theirs = (torch.autograd.grad(3.0 * value, wanted) for value in (actual, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)


def test_equal_models_do_not_diverge_and_large_logits_stay_finite() -> None:
    student, _, head, _ = given()
    value = chunked_kl(student, student.detach(), head, head, chunk=10)
    assert abs(value.item()) < 1e-6
    far = chunked_kl(student * 1e3, student.detach() * -1e3, head, head, chunk=10)
    assert torch.isfinite(far)
    assert far > 100


def test_half_precision_hidden_states_give_gradients_in_their_dtype() -> None:
    values = given(torch.bfloat16)
    value = chunked_kl(*values, chunk=16)
    (slope,) = torch.autograd.grad(value, [values[0]])
    assert slope.dtype == torch.bfloat16
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, plain(*values), rtol=0.05, atol=0.02)


class Largest(TorchDispatchMode):
    """The most entries of any tensor that an operator makes."""

    def __init__(self) -> None:
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else [made]:
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return made


def test_no_tensor_has_the_tokens_times_the_vocabulary() -> None:
    rows, width, words, chunk = 256, 8, 4096, 64
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, width, generator=generator) for _ in range(2))
    head = Head(torch.randn(words, width, generator=generator))
    student.requires_grad_()
    largest = {}
    for name, loss in (("chunked", lambda: chunked_kl(student, teacher, head, head, chunk)),
                       ("plain", lambda: _whole(student, teacher, head))):  # fmt: skip
        with Largest() as seen:
            loss().backward()
        largest[name] = seen.entries
    assert largest["plain"] >= rows * words
    assert largest["chunked"] <= max(rows * chunk, words * width)


def _whole(student: Tensor, teacher: Tensor, head: Head) -> Tensor:
    ours, theirs = (h @ head.weight.T for h in (student, teacher))
    return torch.nn.functional.kl_div(ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="sum")
