"""Capturing: what may be handed in, what comes out, and one clear error where it cannot be done."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import linearize
from linearize.capture.calling import find_logits
from linearize.errors import CaptureError
from linearize.program import Program
from linearize.spec import Site
from tests import zoo
from tests.plain_models import FusedSDPA, LearnedPositions


def test_the_program_names_its_inputs_parameters_and_vocabulary() -> None:
    program = zoo.captured("llama")
    assert program.input_names() == ["input_ids", "attention_mask", "position_ids"]
    assert program.vocab_size == zoo.VOCAB
    assert (program.model_name, program.captured_by) == ("LlamaForCausalLM", "torch.export")
    assert program.source_config is not None
    assert program.source_config["model_type"] == "llama"
    parameters = dict(program.module.named_parameters())
    assert all(parameters[name] is tensor for name, tensor in zoo.source("llama").named_parameters())
    assert zoo.captured("nano_gpt").input_names() == ["input_ids"]
    assert zoo.captured("nano_gpt").source_config is None


def test_sites_name_their_modules_projections_and_nodes() -> None:
    program = zoo.captured("llama")
    names = set(program.nodes_by_name())
    for number, site in enumerate(program.matched):
        assert site.module == f"model.layers.{number}.self_attn"
        assert {name.split(".")[-2] for name in site.projections} == {"q_proj", "k_proj", "v_proj", "o_proj"}
        spec = site.attention
        assert (spec.heads, spec.kv_heads, spec.head_dim, spec.value_dim, spec.hidden_dim) == (4, 2, 8, 8, 32)
        assert spec.scale == pytest.approx(8**-0.5)
        nodes = [site.nodes.query, site.nodes.key, site.nodes.value, site.nodes.core, site.nodes.hidden]
        assert set(nodes) <= names
        assert type(spec).from_dict(spec.to_dict()) == spec


@pytest.mark.parametrize(
    "example",
    [
        torch.ones(1, 1, dtype=torch.int64),
        torch.ones(4, 4, dtype=torch.int64),
        (torch.arange(6).reshape(2, 3),),
        {"input_ids": torch.ones(1, 7, dtype=torch.int64), "attention_mask": torch.ones(1, 7, dtype=torch.int64)},
    ],
    ids=["one token", "square", "tuple", "dict"],
)
def test_example_inputs_of_any_size_give_a_program_for_every_size(example: object) -> None:
    name = "llama_mqa" if isinstance(example, dict) else "enable_gqa"
    model = zoo.source(name)
    program = linearize.capture(model, example)
    for batch, length in ((1, 1), (3, 11)):
        ids = zoo.tokens(batch, length)
        with torch.no_grad():
            actual = program.module(*([ids, torch.ones_like(ids)] if isinstance(example, dict) else [ids]))
        assert zoo.difference(actual, zoo.source_logits(name, ids)) <= 1e-5
    assert len(program.matched) == 1


@pytest.mark.parametrize(
    ("example", "message"),
    [
        ({"tokens": torch.ones(1, 4, dtype=torch.int64)}, r"example_inputs has no 'input_ids': it has \['tokens'\]"),
        (torch.ones(4, dtype=torch.int64), r"input_ids must be an integer tensor \[batch, length\], not a int64"),
        (torch.ones(1, 4), "not a float32 tensor of shape"),
        ("text", "input_ids must be an integer tensor"),
        ((torch.ones(1, 4, dtype=torch.int64),) * 2, "pass token ids alone, or a dict of forward's keyword arguments"),
        (
            {"input_ids": torch.ones(1, 4, dtype=torch.int64), "labels": torch.ones(1, 4, dtype=torch.int64)},
            r"\['labels'\] not understood",
        ),
    ],
)
def test_example_inputs_that_make_no_sense_are_named(example: object, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        linearize.capture(zoo.source("enable_gqa"), example)


def test_a_model_on_the_meta_device_is_described_as_with_weights() -> None:
    source = zoo.source("llama")
    with torch.device("meta"):
        model = type(source)(source.config)
    program = linearize.capture(model)
    real = zoo.captured("llama").matched
    assert len(program.matched) == 2
    for found, expected in zip(program.matched, real, strict=True):
        assert isinstance(found, Site)
        assert found.module == expected.module
        assert (found.attention.heads, found.attention.kv_heads) == (4, 2)
        assert found.attention.mask == expected.attention.mask


def test_a_model_in_half_precision_keeps_its_dtype() -> None:
    model = zoo.BY_NAME["enable_gqa"].build().bfloat16()
    compiled = linearize.compile(model, "none", progress=False)
    ids = zoo.tokens(2, 9)
    with torch.no_grad():
        actual, expected = compiled(ids).logits, model(ids)
    assert actual.dtype == torch.bfloat16
    assert zoo.difference(actual.float(), expected.float()) <= 3e-2
    assert compiled.program.matched[0].attention.dtype == "bfloat16"
    assert linearize.compile(model, "lolcats{window=3}", tokens=0, progress=False)(ids).logits.dtype == torch.bfloat16


def test_a_failure_of_the_model_itself_is_told_as_the_model_tells_it() -> None:
    class Broken(LearnedPositions):
        def forward(self, tokens):  # type: ignore[no-untyped-def]
            raise ArithmeticError("the model's own trouble")

    with pytest.raises(ArithmeticError, match="the model's own trouble"):
        linearize.capture(Broken(FusedSDPA))


def test_a_failed_capture_names_the_module_and_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CaptureError, match=r"cannot trace TutorialTransformer in module 'encoder'.*control flow"):
        linearize.capture(zoo.BY_NAME["tutorial_detects_mask"].build())
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")


def test_capturing_warns_of_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert isinstance(linearize.capture(zoo.source("enable_gqa")), Program)


LOGITS = torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    "output",
    [
        LOGITS,
        (LOGITS, None),
        (torch.tensor(1.0), LOGITS),
        {"logits": LOGITS, "loss": None},
        [LOGITS],
        type("Output", (), {"logits": LOGITS}),
    ],
    ids=["tensor", "logits first", "loss first", "dict", "list", "object"],
)
def test_logits_are_found_in_what_models_return(output: object) -> None:
    assert find_logits(output) is LOGITS


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (None, "the model returned a NoneType"),
        (torch.zeros(2, 3), r"a float32 tensor of shape \[2, 3\]"),
        (torch.zeros(2, 3, 5, dtype=torch.int64), "a int64 tensor"),
        ((torch.tensor(1.0),), "a tuple"),
        ({"hidden": LOGITS}, "a dict"),
    ],
)
def test_outputs_without_logits_are_refused(output: object, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        find_logits(output)


def test_a_base_model_without_a_head_is_still_only_a_function_of_tokens() -> None:
    """transformers' headless model returns hidden states in an object without logits."""
    model = zoo.source("llama").get_submodule("model")
    with pytest.raises(CaptureError, match="with its output head"):
        linearize.capture(model)


def test_a_module_without_parameters_is_refused_by_what_it_returns() -> None:
    with pytest.raises(CaptureError, match="not logits"):
        linearize.capture(nn.Identity())


def test_a_model_that_remembers_the_shape_of_an_earlier_call_is_refused() -> None:
    class Remembering(LearnedPositions):
        """Adds what it saw first to every later call, as a cache in an attribute does."""

        first: torch.Tensor | None = None

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = super().forward(tokens)
            if not torch.compiler.is_compiling():
                self.first = logits.detach() if self.first is None else self.first
                logits = logits + 0 * self.first
            return logits

    with pytest.raises(CaptureError, match=r"does not run at batch 1, length 19 .*keep state from call to call"):
        linearize.capture(Remembering(FusedSDPA))
