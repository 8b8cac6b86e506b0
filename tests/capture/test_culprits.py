"""Finding the module that cannot be traced, where the traceback names none."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from linearize.capture.culprits import why_not_alone
from linearize.capture.recording import Call


class Counts(nn.Module):
    """As many rows as the values say: no graph holds that."""

    def forward(self, x: Tensor) -> Tensor:
        return x[: int(x.sum())]


def call_of(module: nn.Module, x: Tensor) -> Call:
    inputs, inputs_spec = pytree.tree_flatten(((x,), {}))
    outputs, outputs_spec = pytree.tree_flatten(module(x))
    return Call(inputs, inputs_spec, outputs, outputs_spec)


def test_a_module_that_can_be_traced_by_itself_is_no_culprit() -> None:
    assert why_not_alone(nn.ReLU(), [call_of(nn.ReLU(), torch.randn(2, length, 3)) for length in (5, 7)]) == ""


def test_a_module_that_cannot_be_traced_by_itself_says_why() -> None:
    calls = [call_of(Counts(), torch.ones(length)) for length in (5, 7)]
    assert why_not_alone(Counts(), calls) != ""


def test_calls_of_different_ranks_say_nothing() -> None:
    """An activation shared by a state of rank 4 and a projection of rank 3, as in MiniMax."""
    calls = [call_of(nn.ReLU(), torch.randn(*shape)) for shape in ((2, 5, 3), (2, 4, 5, 3))]
    assert why_not_alone(nn.ReLU(), calls) == ""
