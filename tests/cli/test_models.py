"""MODEL: what can be named, and one clear error for what cannot."""

import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from linearize.cli._models import context_limit, hub_answers, load_source, locate, make_module
from linearize.errors import ArtifactError, CaptureError
from tests.cli.conftest import Run, assert_one_error


def no_network(*arguments: object) -> None:
    raise socket.gaierror("Name or service not known")


def test_demo_is_the_embedded_model() -> None:
    location = locate("demo")
    assert location is not None
    assert (Path(location) / "config.json").is_file()


def test_a_path_that_is_not_there_is_one_error(run: Run, tmp_path: Path) -> None:
    assert_one_error(run("inspect", tmp_path / "nope"), "no directory", "nope")


def test_a_directory_without_config_is_one_error(run: Run, tmp_path: Path) -> None:
    assert_one_error(run("inspect", tmp_path), "config.json")


def test_a_file_is_one_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").touch()
    assert_one_error(run("inspect", tmp_path / "model.safetensors"), "is a file", "directory")


def test_an_empty_name_is_one_error(run: Run) -> None:
    assert_one_error(run("inspect", ""), "empty")


def test_a_directory_of_damaged_weights_is_one_error(run: Run, llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((llama_dir / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"not tensors")
    assert_one_error(run("inspect", tmp_path))


def test_a_hub_id_without_a_network_fails_at_once(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for key in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # restored afterwards
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # read at import, which was long ago here
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert not hub_answers()
    assert_one_error(run("inspect", "nobody/no-such-model"), "nobody/no-such-model", "hub cannot be reached")


def test_behind_a_proxy_the_hub_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy")
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    assert hub_answers()


def test_a_bert_is_one_error(run: Run, tmp_path: Path) -> None:
    from transformers import BertConfig, BertForMaskedLM

    config = BertConfig(
        vocab_size=60, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    BertForMaskedLM(config).save_pretrained(tmp_path / "bert")
    assert_one_error(run("inspect", tmp_path / "bert"), "not a decoder")
    assert_one_error(run("compile", tmp_path / "bert", "-o", tmp_path / "out"), "not a decoder")
    assert not (tmp_path / "out").exists()


def test_a_t5_is_one_error(run: Run, tmp_path: Path) -> None:
    from transformers import T5Config

    T5Config(vocab_size=60, d_model=16, num_layers=1).save_pretrained(tmp_path)
    assert_one_error(run("inspect", tmp_path), "causal language model")


def test_a_compiled_directory_is_no_source(run: Run, compiled_dir: Path) -> None:
    assert_one_error(run("inspect", compiled_dir), "compiled already")


# ---- module:factory --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("no_such_module_anywhere:make", ["cannot import no_such_module_anywhere"]),
        ("plain_model_of_a_user:nothing", ["nothing"]),
        ("plain_model_of_a_user:broken", ["ValueError", "no luck today"]),
        ("plain_model_of_a_user:number", ["not callable"]),
        ("os:getcwd", ["gives a str", "torch.nn.Module"]),
        ("plain_model_of_a_user:Attention", ["TypeError"]),
    ],
)
def test_a_factory_that_gives_no_model_is_one_error(run: Run, plain_module: Path, name: str, parts: list[str]) -> None:
    assert_one_error(run("inspect", name), name, *parts)


def test_a_module_whose_import_fails_is_one_error(run: Run, plain_module: Path) -> None:
    (plain_module / "unfinished_module_of_a_user.py").write_text("def make(:\n")
    assert_one_error(run("inspect", "unfinished_module_of_a_user:make"), "SyntaxError")


def test_a_class_a_function_and_an_instance_all_make_a_model(plain_module: Path) -> None:
    assert isinstance(make_module("plain_model_of_a_user:make"), nn.Module)
    assert isinstance(make_module("torch.nn:Identity"), nn.Identity)
    (plain_module / "instance_of_a_user.py").write_text("from torch import nn\nmodel = nn.Linear(2, 2).train()\n")
    assert not make_module("instance_of_a_user:model").training


def test_the_current_directory_shadows_nothing_installed(plain_module: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (plain_module / "shlex.py").write_text("model = None\n")
    with pytest.raises(CaptureError, match="model"):
        make_module("shlex:model")  # the standard library's, which has none


def test_a_name_with_a_colon_that_is_no_factory_is_not_imported() -> None:
    assert locate("./weird:name") if Path("./weird:name").is_dir() else True
    with pytest.raises(ArtifactError, match="no directory"):
        load_source("./weird:name")


def test_the_context_limit_is_read_from_the_config(llama_dir: Path) -> None:
    assert context_limit(load_source(str(llama_dir))) == 128
    assert context_limit(nn.Identity()) is None
