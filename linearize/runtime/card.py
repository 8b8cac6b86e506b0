"""The model card (README.md) of a compiled model: what it is, how to run it, and the table that was measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING

from linearize.printing import bytes_text

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel

CARD = "README.md"
CONTEXTS = (1024, 16384, 131072)


def model_card(model: LinearizedModel) -> str:
    """Markdown with the front matter that the hub reads."""
    sections = [_front_matter(model), _title(model), _use(model), _layers(model), _state(model), _notes(model)]
    return "\n\n".join(section for section in sections if section) + "\n"


def base_model(model: LinearizedModel) -> str:
    """The hub id of the source, '' for a local one."""
    name = str((model.config or {}).get("_name_or_path") or "")
    return name if name.count("/") == 1 and not name.startswith((".", "/", "~")) else ""


def _front_matter(model: LinearizedModel) -> str:
    lines = ["---", "library_name: linearize", "pipeline_tag: text-generation", "tags: [linearize, linear-attention]"]
    if base_model(model):
        lines.append(f"base_model: {json.dumps(base_model(model))}")
    return "\n".join([*lines, "---"])


def _title(model: LinearizedModel) -> str:
    name, recipe = base_model(model) or model.program.model_name, model.plan.recipe or "a plan of its own"
    replaced = sum(entry.mixer != "keep" for entry in model.plan.entries)
    return (
        f"# {name}, linearized\n\n{name} with {replaced} of its {len(model.program.sites)} softmax attentions replaced "
        f"by mixers with a state of fixed size, by `linearize` with recipe `{recipe}`."
    )


def _use(model: LinearizedModel) -> str:
    code = ["import linearize", "", 'model = linearize.load("DIRECTORY")']
    if model.config is not None:
        code += [
            "# or, as a transformers model:",
            "from transformers import AutoModelForCausalLM",
            'model = AutoModelForCausalLM.from_pretrained("DIRECTORY")',
        ]
    return "\n".join(["```python", *code, "```"])


def _layers(model: LinearizedModel) -> str:
    report = model.report
    rows = [
        [str(site.site), site.module, f"`{site.mixer}`", _error(site.error_start), _error(site.error_fitted)]
        for site in report.sites
    ]
    if not rows:
        return ""
    mean = ["", "mean", "", _error(report.mean_error(fitted=False)), _error(report.mean_error())]
    headers = ("layer", "module", "became", "MSE before fitting", "MSE")
    fitted = (
        f"Fitted on {report.tokens_fitted:,} tokens ({report.data}), measured on {report.tokens_held_out:,} held out."
        if report.tokens_fitted
        else "Not fitted: the mixers are as they start."
    )
    explained = "MSE is that of the attention's output, relative to its variance, each layer fed the source's inputs."
    return "\n".join([markdown_table(headers, [*rows, mean], words=3), "", f"{explained} {fitted}"])


def _state(model: LinearizedModel) -> str:
    rows = [[f"{context:,}", bytes_text(model.state_bytes(context=context))] for context in CONTEXTS]
    return markdown_table(("tokens of context", "state of one sequence"), rows, words=0)


def _notes(model: LinearizedModel) -> str:
    return "\n".join(f"- {note}" for note in [*model.report.refused, *model.report.notes])


def _error(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[str]], words: int) -> str:
    """The first `words` columns are text, the others numbers."""
    rules = ["---" if column < words else "---:" for column in range(len(headers))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (headers, rules, *rows))
