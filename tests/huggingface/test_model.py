"""The transformers interface: modules and keys of the source, Auto classes, saving, what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, pipeline

import linearize
from linearize.errors import ArtifactError, DataError
from linearize.passes.lower.raise_linears import RaiseLinears
from linearize.pipeline import run_pipeline
from tests import zoo

RECIPE = "lolcats{window=5}"
TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, not fitted, with its tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("model")
    source = folder / "source"
    source.mkdir()
    for file in linearize.demo_model_dir().iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    (source / "chat_template.jinja").write_text(TEMPLATE)
    generation = json.loads((source / "generation_config.json").read_text())
    (source / "generation_config.json").write_text(json.dumps({**generation, "max_new_tokens": 7}))
    model = AutoModelForCausalLM.from_pretrained(source).eval()
    linearize.compile(model, "lolcats", tokens=0, progress=False).save_pretrained(folder / "out")
    return folder / "out"


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "falcon"])
def test_the_state_dict_has_the_sources_keys_and_values(name: str) -> None:
    model = zoo.compiled(name, "none").to_transformers()
    found, expected = model.state_dict(), zoo.source(name).state_dict()
    assert set(expected) <= set(found)
    assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert isinstance(model, PreTrainedModel)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_linear_layers_are_modules_under_the_sources_names(name: str) -> None:
    kinds = ("Linear", "Conv1D")
    expected = {path for path, module in zoo.source(name).named_modules() if type(module).__name__ in kinds}
    model = zoo.compiled(name, "none").to_transformers()
    found = {path for path, module in model.named_modules() if type(module).__name__ in kinds}
    assert found == expected
    ids = zoo.tokens(2, 11)
    with torch.no_grad():
        assert zoo.difference(model(ids).logits, zoo.source_logits(name, ids)) <= 1e-5
    assert model.get_input_embeddings().weight.shape[0] == model.engine.vocab_size
    head = model.get_output_embeddings()
    assert head is not None
    assert head.weight is model.get_parameter("lm_head.weight")


def test_raising_leaves_the_program_as_it_was() -> None:
    program = zoo.compiled("llama", RECIPE).program
    before = [name for name, _ in program.module.named_modules()]
    raised = run_pipeline(program, [RaiseLinears()], "numerics")
    assert [name for name, _ in program.module.named_modules()] == before
    assert "model.layers.0.mlp.up_proj" in dict(raised.module.named_modules())
    assert raised.module.get_parameter("lm_head.weight") is program.module.get_parameter("lm_head.weight")


def test_auto_classes_know_it_after_import_linearize(saved: Path) -> None:
    code = (
        "import sys, linearize; assert 'transformers' not in sys.modules\n"
        "from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer\n"
        f"d = {str(saved)!r}\n"
        "model, tokenizer = AutoModelForCausalLM.from_pretrained(d), AutoTokenizer.from_pretrained(d)\n"
        "config = AutoConfig.from_pretrained(d)\n"
        "ids = tokenizer('import os', return_tensors='pt')['input_ids']\n"
        "print(type(model).__name__, config.model_type, model.generate(ids, do_sample=False)[0].tolist())\n"
    )
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stderr
    tokenizer = AutoTokenizer.from_pretrained(saved)
    ids = tokenizer("import os", return_tensors="pt")["input_ids"]
    expected = linearize.load(saved).generate(ids, 7)[0].tolist()
    assert run.stdout.split(maxsplit=2) == ["LinearizedForCausalLM", "linearized", f"{expected}\n"]


def test_a_pipeline_answers_batches_and_chats(saved: Path) -> None:
    generate = pipeline("text-generation", model=str(saved))
    prompts = ["def add(a, b):", "import"]
    together = generate(prompts, max_new_tokens=6, do_sample=False, batch_size=2)
    alone = [generate(prompt, max_new_tokens=6, do_sample=False) for prompt in prompts]
    assert [answer[0]["generated_text"] for answer in together] == [answer[0]["generated_text"] for answer in alone]
    chat = generate([{"role": "user", "content": "hello"}], max_new_tokens=3, do_sample=False)
    assert chat[0]["generated_text"][0] == {"role": "user", "content": "hello"}
    assert generate.tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "user: x\n"


def test_the_card_has_the_front_matter_and_the_measured_table(tmp_path: Path) -> None:
    model = zoo.compile_again("llama", "lolcats{window=5}", tokens=600)
    model.save_pretrained(tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert text.startswith("---\nlibrary_name: linearize\n")
    for site in model.report.sites:
        errors = f"{site.error_start:.4f} | {site.error_fitted:.4f}"
        assert f"| {site.site} | {site.module} | `{site.mixer}` | {errors} |" in text
    assert f"Fitted on {model.report.tokens_fitted:,} tokens" in text


def test_saving_again_takes_the_values_as_they_are_now(tmp_path: Path) -> None:
    own = zoo.BY_NAME["llama"].build()  # its weights change
    model = linearize.compile(own, RECIPE, tokens=0, progress=False).to_transformers()
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight.mul_(0.5)
    model.generation_config.temperature = 0.7
    (tmp_path / "notes.txt").write_text("kept")
    model.save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = zoo.tokens(2, 9)
    with torch.no_grad():
        assert torch.equal(again(ids).logits, model(ids).logits)
    assert again.generation_config.temperature == 0.7
    assert (tmp_path / "notes.txt").read_text() == "kept"


def test_what_a_graph_cannot_do_is_refused_by_name(saved: Path) -> None:
    model = zoo.compiled("llama", RECIPE).to_transformers()
    ids = zoo.tokens(1, 4)
    with pytest.raises(DataError, match="inputs_embeds is not available"):
        model(ids, inputs_embeds=torch.zeros(1, 4, 32))
    with pytest.raises(DataError, match="output_hidden_states is not available"):
        model(ids, output_hidden_states=True)
    with pytest.raises(DataError, match="the graph is for 97 tokens; resize the source"):
        model.resize_token_embeddings(120)
    with pytest.raises(ArtifactError, match=r"compiled in torch.float32; for torch.bfloat16 compile the source in it"):
        AutoModelForCausalLM.from_pretrained(saved, dtype=torch.bfloat16)
    with pytest.raises(ArtifactError, match="runs on one device"):
        AutoModelForCausalLM.from_pretrained(saved, device_map={"a": "cpu", "b": 0})
    with pytest.raises(ArtifactError, match="a linearized model is no config alone"):
        AutoModelForCausalLM.from_config(model.config)
    with pytest.raises(ArtifactError, match="is not from transformers"):
        zoo.compiled("nano_gpt").to_transformers()


def test_tokenizer_files_come_from_the_hubs_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from linearize.capture import hf

    snapshot = tmp_path / "models--some--model" / "snapshots" / ("a" * 40)
    snapshot.mkdir(parents=True)
    (snapshot / "tokenizer.json").write_text("{}")
    (snapshot.parent.parent / "refs").mkdir()
    (snapshot.parent.parent / "refs" / "main").write_text("a" * 40)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.file_download.HF_HUB_CACHE", str(tmp_path), raising=False)
    model: Any = zoo.source("llama")
    monkeypatch.setattr(model.config, "_name_or_path", "some/model")
    assert hf.tokenizer_files(model)["tokenizer.json"] == b"{}"
