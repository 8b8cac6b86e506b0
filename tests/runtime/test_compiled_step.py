"""The compiled decode step: the same tokens, and the graph as the fallback."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch

from linearize.runtime.model import LinearizedModel
from tests import zoo

RECIPE = "lolcats{window=5}"


def fresh(recipe: str = RECIPE) -> LinearizedModel:
    return copy.deepcopy(zoo.compiled("llama", recipe))


def test_a_compiled_step_gives_the_same_tokens_and_is_compiled_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    compile_ = torch._inductor.compile

    def counted(graph: Any, inputs: Any, *options: Any) -> Any:
        calls.append(inputs[0].shape[0])
        return compile_(graph, inputs, *options)

    monkeypatch.setattr("torch._inductor.compile", counted)
    model, ids = fresh().compile_step(), zoo.tokens(3, 9)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    expected = zoo.compiled("llama", RECIPE).generate(ids, 12, attention_mask=mask)
    assert torch.equal(model.generate(ids, 12, attention_mask=mask), expected)
    assert torch.equal(model.generate(ids, 12, attention_mask=mask), expected)
    assert model.compiled_step is not None
    assert (calls, model.compiled_step.reason) == ([3], "")


def test_what_cannot_be_compiled_runs_as_before_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any) -> Any:
        raise RuntimeError("no C++ compiler\nsecond line")

    monkeypatch.setattr("torch._inductor.compile", fails)
    model, ids = fresh().compile_step(), zoo.tokens(2, 9)
    with pytest.warns(RuntimeWarning, match="the decode step runs uncompiled: RuntimeError: no C"):
        found = model.generate(ids, 5)
    assert torch.equal(found, zoo.compiled("llama", RECIPE).generate(ids, 5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.generate(ids, 5)  # it is not tried again


def test_a_cache_that_grows_is_not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch._inductor.compile", None)
    model, ids = fresh("none").compile_step(), zoo.tokens(1, 5)
    assert torch.equal(model.generate(ids, 4), zoo.compiled("llama", "none").generate(ids, 4))
    assert model.compiled_step is not None
    assert "grows with every token" in model.compiled_step.reason
