"""`linearize generate`: streams text from a compiled directory."""

import shutil
from pathlib import Path

import pytest
import torch

import linearize
from linearize.cli.generate import load_tokenizer
from tests.cli.conftest import Run, assert_one_error


def test_greedy_text_is_what_the_model_generates(run: Run, compiled_dir: Path) -> None:
    result = run("generate", compiled_dir, "hello", "--max-new-tokens", 12)
    assert result.exit_code == 0, result.stderr
    tokenizer = load_tokenizer(compiled_dir)
    ids = tokenizer("hello", return_tensors="pt")["input_ids"]
    expected = linearize.load(compiled_dir).generate(ids, max_new_tokens=12, eos_token_id=tokenizer.eos_token_id)
    text = tokenizer.decode(expected[0], skip_special_tokens=True)
    assert result.stdout.startswith("hello")
    assert result.stdout.rstrip("\n") == text.rstrip("\n�")


def test_no_echo_leaves_the_prompt_out(run: Run, compiled_dir: Path) -> None:
    with_prompt = run("generate", compiled_dir, "abc", "-n", 8).stdout
    assert run("generate", compiled_dir, "abc", "-n", 8, "--no-echo").stdout == with_prompt.removeprefix("abc")


def test_a_dash_reads_the_prompt_from_stdin(run: Run, compiled_dir: Path) -> None:
    assert run("generate", compiled_dir, "-", "-n", 4, stdin="abc").stdout.startswith("abc")


def test_samples_repeat_with_a_seed_and_temperature_0_is_greedy(run: Run, compiled_dir: Path) -> None:
    sampled = [run("generate", compiled_dir, "ab", "-n", 16, "--temperature", 2, "--seed", 3) for _ in range(2)]
    greedy = [run("generate", compiled_dir, "ab", "-n", 16, *more) for more in ([], ["--temperature", 0])]
    assert sampled[0].stdout == sampled[1].stdout
    assert greedy[0].stdout == greedy[1].stdout
    assert sampled[0].stdout != greedy[0].stdout


def test_characters_of_several_tokens_come_out_whole(
    run: Run, compiled_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = load_tokenizer(compiled_dir)("naïve €")["input_ids"]

    def spoken(*arguments: object) -> list[torch.Tensor]:
        return [torch.tensor([token]) for token in ids]

    monkeypatch.setattr("linearize.runtime.generate.stream", spoken)
    assert run("generate", compiled_dir, "say ", "-n", 20).stdout == "say naïve €\n"


@pytest.mark.parametrize(
    ("options", "part"),
    [(["--top-p", "0"], "top_p"), (["--temperature", "-1"], "temperature"), (["-n", "0"], "max-new-tokens")],
)
def test_options_out_of_range_are_one_error(run: Run, compiled_dir: Path, options: list[str], part: str) -> None:
    assert_one_error(run("generate", compiled_dir, "a", *options), part)


def test_an_empty_prompt_is_one_error(run: Run, compiled_dir: Path) -> None:
    assert_one_error(run("generate", compiled_dir, ""), "prompt is empty")


def test_a_directory_that_is_not_compiled_is_one_error(run: Run, llama_dir: Path, tmp_path: Path) -> None:
    assert_one_error(run("generate", llama_dir, "a"), str(llama_dir))
    assert_one_error(run("generate", tmp_path / "nope", "a"), "nope")


def test_a_directory_without_tokenizer_is_one_error(run: Run, compiled_dir: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(compiled_dir, bare, ignore=lambda folder, names: [name for name in names if "token" in name])
    result = run("generate", bare, "a")
    assert result.exit_code == 1
    assert "token" in result.stderr
    assert "Traceback" not in result.output
