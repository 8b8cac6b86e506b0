"""A `torch.export.ExportedProgram` in the place of a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.errors import CaptureError, RewriteError
from tests import zoo

DYNAMIC = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}


def exported(model: nn.Module, dynamic: dict[int, Any] | None = None, **inputs: Any) -> torch.export.ExportedProgram:
    chosen = DYNAMIC if dynamic is None else dynamic
    shapes = {name: chosen if isinstance(value, Tensor) else None for name, value in inputs.items()}
    with torch.no_grad():
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes, strict=False)


def ids() -> Tensor:
    return zoo.tokens(2, 13)


def test_a_dynamic_program_compiles_and_equals_its_model() -> None:
    program = linearize.capture(exported(zoo.source("nano_gpt"), idx=ids()))
    assert (program.model_name, program.captured_by) == ("NanoGPT", "torch.export by the caller")
    assert program.input_names() == ["input_ids"]
    assert program.vocab_size == zoo.VOCAB
    assert [site.module for site in program.matched] == [site.module for site in zoo.captured("nano_gpt").matched]
    compiled = linearize.compile(program, "none", progress=False)
    for batch, length in ((1, 1), (3, 20)):
        tokens = zoo.tokens(batch, length)
        with torch.no_grad():
            assert zoo.difference(compiled(tokens).logits, zoo.source_logits("nano_gpt", tokens)) <= 1e-5


def test_inputs_are_recognised_by_name_and_logits_in_an_output_object() -> None:
    model = zoo.source("llama_mqa")
    source = exported(model, input_ids=ids(), attention_mask=torch.ones_like(ids()), use_cache=False)
    program = linearize.capture(source)
    assert program.input_names() == ["input_ids", "attention_mask"]
    assert len(program.matched) == 1
    tokens = zoo.tokens(3, 8)
    with torch.no_grad():
        actual = program.module(tokens, torch.ones_like(tokens))
    assert zoo.difference(actual, zoo.source_logits("llama_mqa", tokens)) <= 1e-5


def test_a_static_program_is_inspected_and_not_compiled() -> None:
    source = exported(zoo.source("nano_gpt"), {}, idx=ids())
    found = linearize.inspect(source)
    assert found["captured_by"] == "torch.export by the caller at a static batch and length"
    assert "it runs at no other, and cannot be compiled; export it again with dynamic_shapes" in found["notes"][0]
    with pytest.raises(RewriteError, match="static batch 2 and length 13 only"):
        linearize.compile(source, "none", progress=False)


class Two(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tok = nn.Embedding(zoo.VOCAB, 8)
        self.head = nn.Linear(8, zoo.VOCAB)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, tokens: Tensor, segment: Tensor) -> Tensor:
        return self.head(self.tok(tokens) + self.tok(segment))


class Counts(Two):
    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        self.count += 1  # type: ignore[operator]
        return self.head(self.tok(tokens)) * self.count


class Hidden(Two):
    def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
        return self.tok(tokens).mean(1)


class Embedded(Two):
    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "inputs", "message"),
    [
        (Two, {"tokens": ids(), "segment": ids()}, r"takes \['tokens', 'segment'\]; which of them is input_ids"),
        (Counts, {"tokens": ids()}, "writes into count; export the model without its cache"),
        (Hidden, {"tokens": ids()}, "with its output head"),
        (Embedded, {"x": torch.zeros(2, 13, 8)}, r"takes x \(torch.float32 \[.*, 8\]\); linearize takes programs"),
    ],
)
def test_what_does_not_fit_is_named(model: type[nn.Module], inputs: dict[str, Tensor], message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        linearize.capture(exported(model(), **inputs))


def test_a_length_that_must_be_a_multiple_is_refused() -> None:
    class Pairs(Two):
        def forward(self, tokens: Tensor) -> Tensor:  # type: ignore[override]
            return self.head(self.tok(tokens))

    half = torch.export.Dim("half", min=2, max=100)
    source = exported(Pairs(), {1: 2 * half}, tokens=zoo.tokens(2, 14))
    with pytest.raises(CaptureError, match=r"takes a length of 2\*\w+ only"):
        linearize.capture(source)
