"""`linearize eval`: the tables, the JSON, and what it refuses."""

import json
from pathlib import Path

from tests.cli.conftest import Run, assert_one_error


def test_it_measures_a_compiled_model_against_its_source(
    run: Run, compiled_dir: Path, llama_dir: Path, tmp_path: Path
) -> None:
    for name in ("fox", "dog"):
        (tmp_path / f"{name}.txt").write_text(f"the quick brown {name} jumps over the lazy dog; " * 40)
    files = ["--data", tmp_path / "fox.txt", "--data", tmp_path / "dog.txt"]
    command = ("eval", compiled_dir, "--against", llama_dir, *files, "--rows", 2, "--length", 100)
    result = run(*command, "--json", tmp_path / "figures.json", "--plots", tmp_path / "figures.svg")
    assert result.exit_code == 0, result.output
    figures = json.loads((tmp_path / "figures.json").read_text())
    compiled = figures["models"]["compiled"]
    assert set(compiled["shards"]) == {str(tmp_path / "fox.txt"), str(tmp_path / "dog.txt")}
    assert compiled["by_position"][-1]["high"] == 99
    assert 0 < compiled["kl"] < 1
    assert compiled["state_bytes"] > 0
    assert [site["site"] for site in figures["sites"]] == [0, 1]
    assert set(compiled["recall_by_kind"]) == {"copy", "mqar", "passkey"}
    assert compiled["recall_by_distance"][-1]["high"] > 100  # in rows of 128 tokens, beyond the 100 of the others
    plots = (tmp_path / "figures.svg").read_text()
    assert plots.startswith("<svg")
    assert "recall, %" in plots
    assert "position in the text" in plots
    for part in ("perplexity", "passkey", "far alone", "fox.txt", "window alone", f"{compiled['perplexity']:.2f}"):
        assert part in result.stdout


def test_a_model_that_it_was_not_made_from_is_refused(run: Run, compiled_dir: Path) -> None:
    assert_one_error(run("eval", compiled_dir, "--against", "demo"), "it was not compiled from that model")


def test_data_that_cannot_be_read_is_refused(run: Run, compiled_dir: Path, llama_dir: Path) -> None:
    result = run("eval", compiled_dir, "--against", llama_dir, "--data", "missing.txt")
    assert_one_error(result, "cannot read missing.txt")


def test_a_model_without_a_tokenizer_is_refused(run: Run, plain_module: Path) -> None:
    model = "plain_model_of_a_user:make"
    assert run("compile", model, "-o", "out", "--tokens", 0).exit_code == 0
    assert_one_error(run("eval", "out", "--against", model), f"neither out nor {model} has a tokenizer")
