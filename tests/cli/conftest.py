"""Small models on disk and a way to run commands in this process, as a shell would see them."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from linearize.cli import app

Run = Callable[..., Result]

PLAIN = '''
import torch
from torch import nn
from torch.nn import functional as F


class Attention(nn.Module):
    def __init__(self, dilated):
        super().__init__()
        self.qkv, self.out, self.dilated = nn.Linear(32, 96), nn.Linear(32, 32), dilated

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (4, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        i = torch.arange(x.shape[1])
        gap = i[:, None] - i[None, :]
        mask = (gap >= 0) & (gap % 2 == 0) if self.dilated else gap >= 0
        return self.out(F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two attentions; a dilated one, which sees every other key, is no mask that linearize raises."""

    def __init__(self, *dilated):
        super().__init__()
        self.embed, self.head = nn.Embedding(50, 32), nn.Linear(32, 50)
        self.attentions = nn.ModuleList(Attention(flag) for flag in dilated)

    def forward(self, ids):
        x = self.embed(ids)
        for attention in self.attentions:
            x = x + attention(x)
        return self.head(x)


def make():
    torch.manual_seed(0)
    return Model(False)


def make_dilated():
    torch.manual_seed(0)
    return Model(False, True)


def broken():
    raise ValueError("no luck today")


number = 7
'''


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("inspect", "demo", ...)` -> exit code, stdout, stderr."""
    monkeypatch.setenv("COLUMNS", "120")

    def call(*arguments: object, stdin: str | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return call


@pytest.fixture
def plain_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory is one with plain_model_of_a_user.py in it."""
    (tmp_path / "plain_model_of_a_user.py").write_text(textwrap.dedent(PLAIN))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def llama_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random Llama with a byte-level tokenizer."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("models") / "llama"
    alphabet = ["<bos>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={symbol: index for index, symbol in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<bos>", eos_token="<eos>").save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(alphabet), hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def compiled_dir(llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """That Llama compiled without fitting."""
    path = tmp_path_factory.mktemp("compiled") / "llama"
    result = CliRunner().invoke(app, ["compile", str(llama_dir), "-o", str(path), "--tokens", "0", "--window", "8"])
    assert result.exit_code == 0, result.output
    return path


def assert_one_error(result: Result, *parts: str) -> None:
    """Exit code 1, one line `error: ...` on stderr that holds `parts`, nothing on stdout, no traceback."""
    assert result.exit_code == 1, result.output
    errors = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    for part in parts:
        assert part in errors[0]
