"""What the demo measured, and its tables: the same rows for the terminal, for a page in docs/, and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from linearize.printing import Figure, Row


@dataclass
class Figures:
    """Everything the demo measured; `--json` writes it."""

    versions: dict[str, str]
    threads: int
    window: int
    recipe: str
    beside: str
    baseline: str
    quick: bool = False
    tokens_fitted: int = 0
    sites: list[dict[str, Any]] = field(default_factory=list)
    models: dict[str, dict[str, Any]] = field(default_factory=dict)
    speed: list[dict[str, Any]] = field(default_factory=list)
    onnx: dict[str, Any] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)


def site_figure(figures: Figures) -> Figure:
    from linearize.printing import Figure

    names = list(figures.sites[0]["errors"])
    rows = [
        _site_row(str(site["site"]), site["module"], site["mixer"], [site["errors"][name] for name in names])
        for site in figures.sites
    ]
    means = [sum(site["errors"][name] for site in figures.sites) / len(figures.sites) for name in names]
    return Figure(
        "relative MSE of each attention's output, on held-out text and recall",
        ("site", "module", "mixer", *names),
        [*rows, _site_row("", "mean", "", means)],
        words=("module", "mixer"),
    )


def _site_row(site: str, module: str, mixer: str, errors: Sequence[float]) -> Row:
    return (site, module, mixer, *(f"{error:.4f}" for error in errors))


def model_figure(figures: Figures) -> Figure:
    from linearize.printing import Figure, bytes_text

    first = next(iter(figures.models.values()))
    ranges = [f"{row['low']}-{row['high']}" for row in first["recall_by_distance"]]
    rows = [
        (
            name, f"{row['perplexity']:.2f}", f"{row['kl']:.3f}", f"{row['top1']:.1%}", f"{row['recall']:.1%}",
            *(f"{part['accuracy']:.1%}" for part in row["recall_by_distance"]),
            bytes_text(row["state_bytes"]) if "state_bytes" in row else "grows",
        )
        for name, row in figures.models.items()
    ]  # fmt: skip
    title = f"the whole model: held-out text, and recall from beyond {figures.window} tokens by distance"
    return Figure(title, ("model", "perplexity", "KL", "top-1", "recall", *ranges, "state"), rows, words=("model",))


def speed_figure(figures: Figures) -> Figure:
    from linearize.printing import Figure, bytes_text

    rows = []
    for row in figures.speed:
        pair = [row["source"], row["compiled"]]
        rates = [f"{one['tokens_per_second']:.0f}" for one in pair]
        sizes = [bytes_text(one["state_bytes"]) for one in pair]
        rows.append((f"{row['context']:,}", *rates, *sizes))
    headers = ("context", "source tokens/s", "compiled", "source cache", "compiled state")
    return Figure("decoding one sequence, the source with its key-value cache", headers, rows)


PAGE = """# Figures

What `linearize demo` measured on the embedded model. Written by the run itself:

```console
$ linearize demo --markdown docs/figures.md
```

Compiled by the recipe `{recipe}`. Beside it `{beside}`, fitted on {tokens} tokens of the model's own
samples, and `{baseline}` with its sinks; torch {torch}, torch threads: {threads}; {seconds:.0f} seconds in all.
A machine that is busy gives other speeds, another processor slightly other errors.

{sites}

The error is `mean (y' - y)^2 / var(y)`, each mixer fed the source's own inputs, on rows that no fit has seen.

{models}

Perplexity, KL divergence from the source (nats a token) and share of equal most likely tokens are on files of the
standard library that training held out, context 512. Recall is top-1 accuracy where the answer stands further back than
the window: repeated segments, touching and with a gap, and key-value pairs. State is for one sequence.

{speed}

Steps of both models were taken in turn. The compiled model read all tokens of the context; the source's cache was
filled by reading 512 and repeating its tensors, since a step's cost depends on their shapes alone.

Loading what was saved gave {reload}. ONNX Runtime agreed with PyTorch within {difference:.0e} on logits over a prompt
of {prefill} tokens and {steps} steps, and continued the prompt with {same}.
"""


def markdown_page(figures: Figures) -> str:
    """docs/figures.md."""
    onnx = figures.onnx
    return PAGE.format(
        recipe=figures.recipe,
        baseline=figures.baseline,
        beside=figures.beside,
        tokens=f"{figures.tokens_fitted:,}",
        torch=figures.versions["torch"],
        threads=figures.threads,
        seconds=figures.seconds["total"],
        sites=site_figure(figures).markdown(),
        models=model_figure(figures).markdown(),
        speed=speed_figure(figures).markdown(),
        reload="logits equal to the bit" if onnx["reload_equal"] else "other logits",
        difference=onnx["largest_difference"],
        prefill=onnx["prefill"],
        steps=onnx["steps"],
        same="the same tokens" if onnx["same_tokens"] else "other tokens",
    )
