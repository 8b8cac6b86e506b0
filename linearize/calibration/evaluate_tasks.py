"""Tasks of lm-evaluation-harness on a compiled model and on its source: the extra `linearize[eval]`.

A task is a name that the harness knows, or one of YAML files in a folder of the user's own; nothing is downloaded for
tasks whose data is local.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from linearize.errors import DataError, LinearizeError


def task_scores(
    models: dict[str, nn.Module], tokenizer: Any, tasks: list[str], folder: Path | None, limit: int | None, batch: int
) -> dict[str, dict[str, dict[str, float]]]:
    """{model: {task: {metric: value}}}, as the harness names its metrics (`acc,none`).

    Args:
        models: transformers models (`LinearizedModel.to_transformers()`).
        folder: YAML files of tasks; the harness's own are known beside them.
        limit: examples of a task; None for all.

    Raises:
        LinearizeError: lm-eval is not installed.
        DataError: a task is unknown, or its data cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise LinearizeError(f'tasks need {error.name}: pip install "linearize[eval]"') from error
    own = TaskManager(include_path=str(folder), include_defaults=False) if folder is not None else None
    known = own if own is not None and set(tasks) <= set(own.all_tasks) else TaskManager(
        include_path=str(folder) if folder is not None else None
    )  # fmt: skip
    unknown = sorted(set(tasks) - set(known.all_tasks))
    if unknown:
        raise DataError(f"no task named {unknown[0]!r}: lm-eval has none, nor has {folder or '--task-folder'}")
    found = {}
    for name, model in models.items():
        wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch)
        try:
            result = lm_eval.simple_evaluate(
                wrapped, tasks=list(tasks), task_manager=known, limit=limit, bootstrap_iters=0, log_samples=False
            )
        except (OSError, ValueError, ConnectionError) as error:
            raise DataError(f"the tasks {', '.join(tasks)} cannot be run: {error}") from error
        found[name] = {task: numbers(row) for task, row in (result or {})["results"].items()}
    return found


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The metrics of one task without its standard errors and its name."""
    return {
        key: float(value) for key, value in row.items() if isinstance(value, int | float) and "_stderr" not in key
    }
