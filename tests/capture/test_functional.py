"""Whether an exported program is traced a second time, and that casts have one spelling where it is not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from linearize.capture.functional import functional
from linearize.passes.normalise.spell_casts import SpellCasts
from linearize.program import Program
from linearize.rewriting.walk import is_op
from tests import zoo

aten = torch.ops.aten


class Applied(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def exported(model: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    dims = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    with torch.no_grad():
        return torch.export.export(model.eval(), (example,), dynamic_shapes=dims, strict=False)


def targets(program: torch.export.ExportedProgram) -> set[object]:
    return {node.target for node in program.graph.nodes if node.op == "call_function"}


def settled(function: Callable[[Tensor], Tensor]) -> bool:
    program = exported(Applied(function), torch.randn(3, 5))
    return functional(program) is program


def test_a_functional_program_is_taken_as_it_is() -> None:
    assert settled(
        lambda x: nn.functional.dropout(x.reshape(-1).to(torch.float64), 0.1, training=False).sum() * x.shape[0]
    )


@pytest.mark.parametrize(
    "function",
    [
        pytest.param(lambda x: (x * 2).add_(1), id="in place"),
        pytest.param(lambda x: x.flatten(0, 1) + 1, id="a view that no pass spells"),
        pytest.param(lambda x: nn.functional.dropout(x, 0.5, training=True), id="random numbers"),
    ],
)
def test_what_is_not_functional_or_not_spelled_is_decomposed(function: Callable[[Tensor], Tensor]) -> None:
    program = exported(Applied(function), torch.randn(3, 5))
    after = functional(program)
    assert after is not program
    assert not any(target._schema.is_mutable for target in targets(after) if isinstance(target, torch._ops.OpOverload))
    assert aten.flatten.using_ints not in targets(after)


def test_a_llama_is_traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(torch.export.ExportedProgram, "run_decompositions", refuse)
    program = zoo.captured.__wrapped__("llama")  # not the one that other tests have captured
    assert len(program.matched) == zoo.LAYERS


def cast(function: Callable[[Tensor], Tensor]) -> tuple[object, dict[str, object]]:
    module = exported(Applied(function), torch.randn(3, 5)).module()
    program = Program(module=module, model_name="Cast", captured_by="a test")  # type: ignore[arg-type]
    after = SpellCasts().run(program)
    x = torch.randn(4, 6)
    assert torch.equal(after.module(x)[0], function(x))  # the plain graph returns a tuple
    [node] = [node for node in after.graph.nodes if is_op(node, aten.to, aten._to_copy)]
    return node.target, dict(node.kwargs)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.to(torch.float64),
        lambda x: x.to("cpu", torch.float64),
        lambda x: x.to(torch.zeros(1, dtype=torch.float64)),
        lambda x: x.double(),
    ],
)
def test_every_cast_is_spelled_the_same(function: Callable[[Tensor], Tensor]) -> None:
    target, options = cast(function)
    assert (target, options) == (aten._to_copy.default, {"dtype": torch.float64})


def test_a_cast_to_what_it_is_stays_for_strip_noops() -> None:
    target, _ = cast(lambda x: x.to(torch.float32))
    assert isinstance(target, torch._ops.OpOverload)
    assert target.overloadpacket is aten.to
