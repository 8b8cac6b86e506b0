"""compile() and its friends: the whole dataflow on a tiny model, the source left alone, and what is told when not."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import linearize
from linearize.errors import CaptureError, DataError, RecipeError
from linearize.recipe import Fit, LayerRule, Recipe
from tests import zoo

BRIEF = Recipe(
    name="brief",
    rules=(LayerRule(mixer="lolcats", options={"window": 4}),),
    fit=Fit(tokens=1500, length=24, batch=4),
)


def batches(count: int = 12, rows: int = 4, length: int = 24) -> list[torch.Tensor]:
    return [zoo.tokens(rows, length, seed=index) for index in range(count)]


def snapshot(model: nn.Module) -> dict[str, object]:
    """Everything of a model that capturing or compiling might touch."""
    return {
        "modes": [module.training for module in model.modules()],
        "keys": [sorted(module.__dict__) for module in model.modules()],
        "parameters": {name: (id(p), p.requires_grad, p._version) for name, p in model.named_parameters()},
        "buffers": {name: (id(b), b._version) for name, b in model.named_buffers()},
        "grads": [p.grad is None for p in model.parameters()],
        "hooks": [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()],
        "config": str(getattr(model, "config", None)),
    }


@pytest.mark.parametrize("name", ["llama", "gpt2", "frozen_half"])
@pytest.mark.parametrize("training", [False, True])
def test_the_source_is_left_exactly_as_it_was(name: str, training: bool) -> None:
    model = zoo.BY_NAME[name].build().train(training)
    if name == "frozen_half":
        model.get_submodule("blocks.0").eval()
    before, values = snapshot(model), {name: tensor.clone() for name, tensor in model.state_dict().items()}
    generator_state = torch.get_rng_state()
    linearize.compile(model, BRIEF, calibration=batches(), progress=False)
    after = snapshot(model)
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert after == before
    assert all(torch.equal(tensor, values[name]) for name, tensor in model.state_dict().items())
    assert torch.is_grad_enabled()


def test_a_capture_that_fails_leaves_the_source_too() -> None:
    model = zoo.BY_NAME["branch_on_values"].build().train()
    before = snapshot(model)
    with pytest.raises(CaptureError):
        linearize.capture(model)
    assert snapshot(model) == before


def test_fitting_lowers_the_error_on_held_out_rows_and_is_recorded() -> None:
    compiled = zoo.compile_again("llama", BRIEF, calibration=batches())
    report = compiled.report
    assert report.data == "given token ids"
    assert (report.tokens_fitted, report.tokens_held_out) == (11 * 96, 96)
    for row in report.sites:
        assert row.error_start is not None
        assert row.error_fitted is not None
        assert row.error_fitted < 0.9 * row.error_start
        assert row.parameters > 0
    assert report.mean_error() < report.mean_error(fitted=False)  # type: ignore[operator]


def test_the_same_seed_gives_the_same_weights_and_another_does_not() -> None:
    def weights(seed: int) -> torch.Tensor:
        compiled = zoo.compile_again("llama", BRIEF, seed=seed, tokens=300)
        named = [p.flatten() for name, p in compiled.named_parameters() if "linearize_mixers" in name]
        assert compiled.report.data == "the teacher's own samples"
        return torch.cat(named)

    one, two, three = weights(5), weights(5), weights(6)
    assert torch.equal(one, two)
    assert not torch.equal(one, three)


def test_tokens_zero_leaves_the_mixers_at_their_start_and_touches_no_data() -> None:
    def never():  # type: ignore[no-untyped-def]
        raise AssertionError("the data was read")
        yield

    compiled = zoo.compile_again("llama", "lolcats{window=40}", tokens=0, calibration=never())
    assert compiled.report.data == ""
    assert [row.error_fitted for row in compiled.report.sites] == [None, None]
    ids = zoo.tokens(2, 30)
    with torch.no_grad():
        assert zoo.difference(compiled(ids).logits, zoo.source_logits("llama", ids)) <= 1e-4


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "the calibration data is empty: it yields no batch of token ids"),
        (iter(()), "the calibration data is empty"),
        ([torch.tensor([[1, 97]])], "token id 97 at row 0, position 1 is outside the vocabulary 0..96"),
        ([torch.tensor([[1.0, 2.0]])], "must be an integer tensor"),
        ([torch.tensor([[1], [2]])], "calibration batch 0 has sequences of one token"),
        ([torch.tensor([1, 2, 3])], r"must be an integer tensor \[batch, length\], not \[3\]"),
        (["some text"], "not str"),
        ([batches(1)[0], torch.zeros(0, 4, dtype=torch.int64)], "is empty"),
    ],
)
def test_data_that_cannot_be_fitted_on_is_told(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        zoo.compile_again("llama", BRIEF, calibration=data)


def test_data_beyond_the_learned_positions_is_told() -> None:
    with pytest.raises(DataError, match=r"sequences of 65 tokens, more than the source's 64 learned"):
        zoo.compile_again("gpt2", BRIEF, calibration=[zoo.tokens(2, 65)])


@pytest.mark.parametrize("name", ["nano_gpt", "multi_query", "rotary_tables", "one_hot_tokens"])
def test_plain_modules_compile_to_every_recipe_that_fits_them(name: str) -> None:
    ids = zoo.tokens(2, 12)
    for recipe in ("lolcats{window=12}", "window{window=9,sinks=3}"):
        with torch.no_grad():
            actual = zoo.compiled(name, recipe)(ids).logits
        assert zoo.difference(actual, zoo.source_logits(name, ids)) <= 1e-4
    lizard = zoo.compiled(name, "lizard{window=12}")
    for row in lizard.report.sites:
        assert row.mixer.startswith("lizard") or "not recovered" in row.reason


def test_what_is_not_a_model_or_a_recipe_is_told() -> None:
    with pytest.raises(CaptureError, match=r"expected a torch.nn.Module, got a str"):
        linearize.compile("llama")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="no recipe named 'lolcads'"):
        linearize.compile(nn.Linear(2, 2), "lolcads")


def test_inspect_describes_every_site() -> None:
    from linearize.api import describe

    found = describe(zoo.captured("gemma3"), "lolcats{window=8}")
    assert (found["model"], found["captured_by"]) == ("Gemma3ForCausalLM", "torch.export")
    assert [site["mask"] for site in found["sites"]] == ["sliding(6)", "causal"]
    assert found["sites"][0]["plan"] == "window{window=6}"
    assert found["sites"][1]["plan"].startswith("lolcats{window=8")
    first = found["sites"][0]
    assert {key: first[key] for key in ("index", "module", "status", "heads", "kv_heads", "head_dim")} == {
        "index": 0, "module": "model.layers.0.self_attn", "status": "matched", "heads": 4, "kv_heads": 2, "head_dim": 8,
    }  # fmt: skip
    refused = describe(zoo.captured("strided"))["sites"][0]
    assert refused["status"] == "refused"
    assert "hides 576 past ones" in refused["reason"]
    assert refused["plan"] is None
    assert refused["mask"] is None


def test_the_public_names_are_there_and_nothing_heavy_is_imported() -> None:
    code = (
        "import linearize, sys; assert not {'transformers', 'onnx', 'triton'} & set(sys.modules);"
        "[getattr(linearize, name) for name in linearize.__all__];"
        "assert set(linearize.__all__) <= set(dir(linearize));"
        "import linearize.capture.hf; assert callable(linearize.capture) and linearize.capture.hf"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd="/")
    with pytest.raises(AttributeError, match="has no attribute 'kompile'"):
        linearize.kompile  # noqa: B018
    assert (linearize.demo_model_dir() / "config.json").is_file()


@pytest.mark.parametrize(
    "name",
    [
        "llama",
        "gpt2",
        "nano_gpt",
        "opt",
    ],
)
def test_saved_and_loaded_is_the_same_to_the_bit(tmp_path: Path, name: str) -> None:
    model, ids = zoo.compiled(name, "lolcats{window=4}"), zoo.tokens(3, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    loaded = linearize.load(model.save_pretrained(tmp_path / "out"))
    with torch.no_grad():
        assert torch.equal(loaded(ids, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)
    assert loaded.plan == model.plan
    assert loaded.program.max_positions == model.program.max_positions
