"""lm-evaluation-harness on a saved model, by a task whose file and data are local."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from linearize.calibration.evaluate_tasks import task_scores
from linearize.capture import hf
from linearize.errors import DataError, LinearizeError
from tests.cli.conftest import Run, assert_one_error

TASK = """
task: pick
dataset_path: json
dataset_kwargs:
  data_files: {{"test": "{data}"}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""


@pytest.fixture
def task_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    pytest.importorskip("lm_eval", reason="linearize[eval] is not installed; linearize[dev] has it")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    rows = [{"question": "the quick brown", "choices": [" fox", " dog"], "answer": index % 2} for index in range(6)]
    data = tmp_path / "pick.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "pick.yaml").write_text(TASK.format(data=data))
    return folder


def test_a_local_task_is_scored_on_the_saved_model_and_its_source(
    run: Run, compiled_dir: Path, llama_dir: Path, task_folder: Path, tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("the quick brown fox jumps over the lazy dog; " * 40)
    result = run(
        "eval", compiled_dir, "--against", llama_dir, "--data", text, "--rows", 1, "--length", 64, "--far", 0,
        "--no-sites", "--task", "pick", "--task-folder", task_folder, "--json", tmp_path / "figures.json",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    tasks = json.loads((tmp_path / "figures.json").read_text())["tasks"]
    for model in ("source", "compiled"):
        assert tasks[model]["pick"]["acc,none"] == 0.5  # one answer to every row, which is right in every second
    assert "pick" in result.stdout
    unknown = run("eval", compiled_dir, "--against", llama_dir, "--data", text, "--rows", 1, "--length", 64,
                  "--no-sites", "--task", "no_such_task", "--task-folder", task_folder)  # fmt: skip
    assert_one_error(unknown, "no task named 'no_such_task'")


def test_without_the_extra_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(LinearizeError, match=r'pip install "linearize\[eval\]"'):
        task_scores({}, None, ["pick"], None, None, 1)


def test_a_task_whose_data_is_gone_is_said(task_folder: Path, llama_dir: Path) -> None:
    (task_folder.parent / "pick.jsonl").unlink()
    model, tokenizer = hf.load_model(str(llama_dir)), hf.load_tokenizer(str(llama_dir))
    with pytest.raises(DataError, match="pick cannot be run"):
        task_scores({"source": model}, tokenizer, ["pick"], task_folder, None, 1)
