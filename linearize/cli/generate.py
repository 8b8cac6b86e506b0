"""`linearize generate`: continue a prompt with a compiled model, token by token."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from linearize.cli._mixers import Mixers
from linearize.cli._shell import out
from linearize.errors import ArtifactError, DataError

if TYPE_CHECKING:
    from torch import Tensor

    Stream = Callable[[Tensor, int], Iterator[Any]]

REPLACEMENT = "�"


def generate(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="What linearize compile or export wrote.", show_default=False)
    ],
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
    mixers: Mixers = None,
) -> None:
    """Continue a prompt, printing text as it comes. Memory stays the same however long it gets."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise DataError("the prompt is empty; give some text to continue")
    sampled = (temperature is not None or top_k > 0 or top_p < 1.0) and temperature != 0.0
    choice = {"temperature": temperature or 1.0, "top_k": top_k, "top_p": top_p, "seed": seed} if sampled else {}
    model = load(directory, choice)
    tokenizer = load_tokenizer(directory)
    input_ids = tokenizer(text, return_tensors="pt")["input_ids"]
    if input_ids.numel() == 0:
        raise DataError(f"the tokenizer makes no tokens of the prompt {text!r}")
    if echo:
        out().print(text, style="dim", end="", markup=False, soft_wrap=True)
    stream_text(model(input_ids, max_new_tokens), tokenizer, input_ids[0].tolist())


def load(directory: Path, choice: dict[str, Any]) -> Stream:
    """The compiled or exported model in `directory` as a function from a prompt to its next tokens.

    Raises:
        ArtifactError: there is none. DataError: an exported one is to be sampled from.
    """
    if is_exported(directory):
        return load_exported(directory, choice)
    import linearize
    from linearize.runtime.generate import Sampling, stream

    compiled = linearize.load(directory)
    sampling = Sampling(do_sample=bool(choice), **choice)
    return lambda input_ids, count: stream(compiled, input_ids, count, sampling)


def is_exported(directory: Path) -> bool:
    return (directory / "model.onnx").is_file()


def load_exported(directory: Path, choice: dict[str, Any]) -> Stream:
    if choice:
        raise DataError(f"{directory} is an ONNX export, which generates greedily here; sample from the compiled model")
    from linearize.export.runner import OnnxModel

    exported = OnnxModel(directory)
    return lambda input_ids, count: exported.stream(input_ids.numpy(), count)


def load_tokenizer(directory: Path) -> Any:
    from linearize.capture import hf

    tokenizer = hf.load_tokenizer(directory)
    if tokenizer is None:
        raise ArtifactError(
            f"{directory} holds no tokenizer; use linearize.load({str(directory)!r}).generate(input_ids) in Python"
        )
    return tokenizer


def stream_text(new: Iterator[Any], tokenizer: Any, prompt: list[int]) -> None:
    """Write the continuation to stdout as soon as whole characters are known, up to the token that ends a text."""
    tokens, shown = list(prompt), tokenizer.decode(prompt, skip_special_tokens=True)
    for token in new:
        tokens.append(int(token[0]))
        if tokens[-1] == tokenizer.eos_token_id:
            break
        text = tokenizer.decode(tokens, skip_special_tokens=True)
        if not text.endswith(REPLACEMENT):  # a character may take several tokens
            sys.stdout.write(text[len(shown) :])
            sys.stdout.flush()
            shown = text
    print()
