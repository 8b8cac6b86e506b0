"""`linearize compile`: what it writes, what it refuses before working, and that killing it leaves all or nothing."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import linearize
import linearize.on_disk
from linearize.plan import Plan
from tests.cli.conftest import Run, assert_one_error


def test_it_writes_a_directory_that_loads_with_its_tokenizer(compiled_dir: Path) -> None:
    compiled = linearize.load(compiled_dir)
    assert compiled(torch.tensor([[2, 3, 4]])).logits.shape == (1, 3, 258)
    assert [entry.options["window"] for entry in compiled.plan.entries] == [8, 8]
    assert (compiled_dir / "tokenizer.json").is_file()


def test_it_fits_on_a_text_file_and_reports_errors(run: Run, llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40)
    result = run(
        "compile", llama_dir, "-o", tmp_path / "out", "--data", tmp_path / "text.txt", "--tokens", 1024, "--window", 8,
        "--recipe", "lolcats",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "relative MSE" in result.stdout
    assert "whatever its length" in result.stdout
    report = linearize.load(tmp_path / "out").report
    passes = linearize.Recipe.load("lolcats").fit.passes
    assert report.tokens_fitted // passes + report.tokens_held_out == 1024
    assert all(site.error_fitted is not None for site in report.sites)


def test_it_distils_the_whole_model_when_asked(run: Run, llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40)
    result = run(
        "compile", llama_dir, "-o", tmp_path / "out", "--data", tmp_path / "text.txt", "--tokens", 0, "--distill", 1024,
        "--recipe", "window{window=8}",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "whole model: KL " in result.stdout
    found = linearize.load(tmp_path / "out").report.end_to_end
    assert found is not None
    assert found.tokens >= 1024
    assert found.kl_end <= found.kl_start


def test_quiet_prints_nothing(run: Run, plain_module: Path) -> None:
    result = run("compile", "plain_model_of_a_user:make", "-o", "out", "--tokens", 0, "--quiet")
    assert (result.exit_code, result.output) == (0, "")
    assert (plain_module / "out" / "linearize.json").is_file()


def test_it_follows_an_edited_plan(run: Run, plain_module: Path) -> None:
    model = "plain_model_of_a_user:make"
    assert run("inspect", model, "--recipe", "lolcats", "--save-plan", "plan.json").exit_code == 0
    plan = Plan.load("plan.json")
    edited = plan.entries[0].model_copy(update={"mixer": "window", "options": {"window": 5}})
    plan.model_copy(update={"entries": (edited,)}).save("plan.json")
    result = run("compile", model, "-o", "out", "--plan", "plan.json", "--tokens", 0)
    assert result.exit_code == 0, result.output
    assert linearize.load("out").plan.entries[0].label() == "window{window=5}"


def test_an_interrupted_fit_is_gone_on_from_by_the_same_command(
    run: Run, plain_module: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("compile", "plain_model_of_a_user:make", "-o", "out", "--recipe", "lolcats{window=4}", "--tokens", 256)
    with monkeypatch.context() as patch:
        patch.setattr(linearize.runtime.model.LinearizedModel, "save_pretrained", interrupted)
        stopped = run(*command)
    assert stopped.exit_code == 130
    assert "finished layers are kept in" in stopped.stderr
    assert (plain_module / "out.fitting").is_dir()
    assert not (plain_module / "out").exists()
    done = run(*command)
    assert done.exit_code == 0, done.output
    assert "going on from what an earlier run left in out.fitting" in done.stderr
    assert not (plain_module / "out.fitting").exists()
    assert linearize.load("out").report.sites[0].error_fitted is not None


def interrupted(*_: object) -> None:
    raise KeyboardInterrupt


def test_streaming_writes_the_same_and_says_first_what_it_takes(run: Run, llama_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog; " * 40)
    options = ("--data", tmp_path / "text.txt", "--tokens", 1024, "--recipe", "lolcats{window=8,features=8}")
    streamed = run("compile", llama_dir, "-o", tmp_path / "streamed", "--streaming", *options)
    assert streamed.exit_code == 0, streamed.output
    assert "of memory" in streamed.stderr
    assert "block by block" in streamed.stderr
    assert run("compile", llama_dir, "-o", tmp_path / "whole", "--no-streaming", *options).exit_code == 0
    ids = torch.arange(40)[None]
    logits = [linearize.load(tmp_path / name)(ids).logits for name in ("streamed", "whole")]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-6)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["streamed", "text.txt", "whole"]


def test_a_model_that_does_not_fit_is_streamed_by_itself(
    run: Run, llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not linearize.on_disk.needs_streaming(llama_dir)
    monkeypatch.setattr("linearize.on_disk.free_memory", lambda: 300 << 20)
    assert linearize.on_disk.needs_streaming(llama_dir)
    result = run("compile", llama_dir, "-o", tmp_path / "out", "--recipe", "lolcats{window=8}", "--tokens", 0)
    assert result.exit_code == 0, result.output
    assert "block by block" in result.stderr


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("plain_model_of_a_user:make", "--streaming"), "is no local directory of a transformers model"),
        (("demo", "--memory", "lots"), "'lots' is no amount of memory; write 8GiB"),
    ],
)
def test_streaming_what_cannot_be_is_told(run: Run, plain_module: Path, options: tuple[str, ...], message: str) -> None:
    assert_one_error(run("compile", "-o", "out", *options), message)


# ---- refused before any work: the model named here does not exist ----------------------------------------------------


def test_an_existing_output_is_one_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert_one_error(run("compile", "/nowhere", "-o", tmp_path / "out"), "exists already")
    assert (tmp_path / "out" / "precious").exists()


def test_an_output_below_a_file_is_one_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert_one_error(run("compile", "/nowhere", "-o", tmp_path / "file" / "out"), "is not a directory")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_an_unwritable_output_is_one_error(run: Run, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    assert_one_error(run("compile", "/nowhere", "-o", tmp_path / "out"), "ermission")
    tmp_path.chmod(0o700)


def test_an_output_that_nobody_can_write_is_one_error(run: Run) -> None:
    assert_one_error(run("compile", "/nowhere", "-o", "/proc/out"), "/proc/out")


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        (["--recipe", "nope"], ["no recipe named 'nope'"]),
        (["--recipe", "lolcats{colour=3}"], ["no option 'colour'"]),
        (["--recipe", "none", "--window", "8"], ["no option 'window'"]),
        (["--recipe", "missing.toml"], ["missing.toml"]),
        (["--plan", "missing.json"], ["missing.json"]),
        (["--data", "missing.txt"], ["missing.txt", "No such file"]),
        (["--data", "missing.jsonl:body=2"], ["missing.jsonl", "No such file"]),
        (["--data", "missing.txt=0"], ["must be above zero"]),
    ],
)
def test_what_does_not_exist_is_one_error(run: Run, tmp_path: Path, options: list[str], parts: list[str]) -> None:
    assert_one_error(run("compile", "/nowhere", "-o", tmp_path / "out", *options), *parts)


def test_an_empty_calibration_file_is_one_error(run: Run, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    result = run("compile", "/nowhere", "-o", tmp_path / "out", "--data", tmp_path / "empty.txt")
    assert_one_error(result, "is empty")


@pytest.mark.parametrize(("content", "part"), [(b" \n\n ", "empty"), (b"\xff\xfe\x00", "not UTF-8")])
def test_a_calibration_file_without_text_is_one_error(
    run: Run, llama_dir: Path, tmp_path: Path, content: bytes, part: str
) -> None:
    (tmp_path / "data.txt").write_bytes(content)
    assert_one_error(run("compile", llama_dir, "-o", tmp_path / "out", "--data", tmp_path / "data.txt"), part)
    assert not (tmp_path / "out").exists()


def test_data_for_a_model_without_tokenizer_is_one_error(run: Run, plain_module: Path) -> None:
    (plain_module / "text.txt").write_text("some text")
    result = run("compile", "plain_model_of_a_user:make", "-o", "out", "--data", "text.txt")
    assert_one_error(result, "no tokenizer")


def test_a_tokenizer_of_another_vocabulary_is_one_error(run: Run, llama_dir: Path, tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    for file in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / file).write_bytes((llama_dir / file).read_bytes())
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text("words " * 100)
    result = run("compile", tmp_path, "-o", tmp_path / "out", "--data", tmp_path / "text.txt", "--tokens", 64)
    assert_one_error(result, "outside the model's vocabulary 0..39")
    assert not (tmp_path / "out").exists()


# ---- killed at any time ----------------------------------------------------------------------------------------------


def temporary_is_there(folder: Path) -> bool:
    return any(entry.name.startswith(".out.") for entry in folder.iterdir())


def output_is_there(folder: Path) -> bool:
    return (folder / "out").exists()


@pytest.mark.parametrize(
    ("reached", "delay"),
    [(None, 4.0), (temporary_is_there, 0.0), (temporary_is_there, 0.004), (output_is_there, 0.0)],
    ids=["while it works", "as it starts to write", "while it writes", "when it has written"],
)
def test_killing_it_leaves_no_output_or_a_complete_one(
    plain_module: Path, reached: Callable[[Path], bool] | None, delay: float
) -> None:
    command = ["compile", "plain_model_of_a_user:make", "-o", "out", "--tokens", "0", "--quiet"]
    code = f"import sys; sys.argv = ['linearize', *{command!r}]; from linearize.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-P", "-c", code], cwd=plain_module, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 240
    while reached is not None and not reached(plain_module) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    time.sleep(delay)
    process.send_signal(signal.SIGKILL)
    assert process.wait() in (0, -signal.SIGKILL), process.stderr.read() if process.stderr else ""
    if (plain_module / "out").exists():
        assert linearize.load(plain_module / "out")(torch.tensor([[1, 2]])).logits.shape == (1, 2, 50)
    else:
        assert reached is not output_is_there
