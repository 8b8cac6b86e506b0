"""`linearize generate`: continue a prompt with a compiled model, token by token."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearize.cli._shell import out
from linearize.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from linearize.runtime.model import LinearizedModel

REPLACEMENT = "�"


def generate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What linearize compile wrote.", show_default=False)],
    prompt: Annotated[
        str, typer.Argument(metavar="PROMPT", help="Text to continue; - reads it from stdin.", show_default=False)
    ],
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1, help="Stop after so many.")] = 100,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, help="Sample at this temperature. [dim]Without it, or at 0: greedy.[/dim]")
    ] = None,
    top_k: Annotated[int, typer.Option(min=0, help="Sample among the k most likely; 0 for all.")] = 0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Sample among the most likely of this mass.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes samples repeatable.")] = None,
    echo: Annotated[bool, typer.Option(help="Print the prompt before its continuation.")] = True,
) -> None:
    """Continue a prompt, printing text as it comes. Memory stays the same however long it gets."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise DataError("the prompt is empty; give some text to continue")
    import linearize
    from linearize.runtime.generate import Sampling

    compiled = linearize.load(directory)
    tokenizer = load_tokenizer(directory)
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if input_ids.numel() == 0:
        raise DataError(f"the tokenizer makes no tokens of the prompt {text!r}")
    sampled = temperature is not None or top_k > 0 or top_p < 1.0
    sampling = Sampling(
        do_sample=sampled and temperature != 0.0,
        temperature=temperature or 1.0,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        eos_token_id=end_token(compiled, tokenizer),
    )
    if echo:
        out().print(text, style="dim", end="", markup=False, soft_wrap=True)
    stream_text(compiled, tokenizer, input_ids, max_new_tokens, sampling)


def load_tokenizer(directory: Path) -> Any:
    from linearize.capture import hf

    tokenizer = hf.load_tokenizer(directory)
    if tokenizer is None:
        raise ArtifactError(
            f"{directory} holds no tokenizer; use linearize.load({str(directory)!r}).generate(input_ids) in Python"
        )
    return tokenizer


def end_token(compiled: LinearizedModel, tokenizer: Any) -> int | None:
    """The id that ends a text: the tokenizer's, else the first that the source's config names."""
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    ends = (compiled.config or {}).get("eos_token_id")
    first = ends[0] if isinstance(ends, list) and ends else ends
    return first if isinstance(first, int) else None


def stream_text(compiled: LinearizedModel, tokenizer: Any, input_ids: Any, max_new_tokens: int, sampling: Any) -> None:
    """Write the continuation to stdout as soon as whole characters are known."""
    from linearize.runtime.generate import stream

    prompt = input_ids[0].tolist()
    tokens, shown = list(prompt), tokenizer.decode(prompt, skip_special_tokens=True)
    for token in stream(compiled, input_ids, max_new_tokens, sampling):
        tokens.append(int(token[0]))
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith(REPLACEMENT):  # a character may take several tokens
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    print()
