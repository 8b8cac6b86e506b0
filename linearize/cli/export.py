"""`linearize export`: a compiled model in another format."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

from linearize.cli._mixers import Mixers
from linearize.cli._shell import out, say


def export_model(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="What linearize compile wrote.", show_default=False)],
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="DIR", help="Directory to write; it must not exist yet.", show_default=False
        ),
    ],
    form: Annotated[str, typer.Option("--format", "-f", help="File format: onnx, torchscript, pt2 or pte.")] = "onnx",
    portable: Annotated[
        bool, typer.Option("--portable", help="Standard ONNX operators only, none of onnxruntime's own.")
    ] = False,
    genai: Annotated[
        bool, typer.Option("--genai", help="States as onnxruntime-genai carries them, and its genai_config.json.")
    ] = False,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            help="Weights in fewer bits: int8 or int4 (fast natively), web (small, for wasm).",
            show_default=False,
        ),
    ] = None,
    aoti: Annotated[bool, typer.Option("--aoti", help="With pt2: also a package compiled for this CPU.")] = False,
    memory: Annotated[
        str | None,
        typer.Option(
            "--memory",
            metavar="BYTES",
            help="What this may take, as 8GiB: refused before the work where it needs more. Format onnx.",
            show_default=False,
        ),
    ] = None,
    mixers: Mixers = None,
) -> None:
    """Write a compiled model in another format, and check the file against PyTorch.

    One graph serves prompts and single steps: tokens and a state in, logits and the new state out.

    It runs in onnxruntime without PyTorch; linearize.json beside it says what each input and output is.
    """
    from linearize.files import check_new_directory

    check_new_directory(output)
    import linearize
    from linearize.calibration.limits import parse_bytes

    most = parse_bytes(memory) if memory is not None else None
    say(f"exporting {directory} to {form} and checking it")
    started = time.perf_counter()
    path = linearize.export_directory(
        directory, output, form, portable=portable, genai=genai, quantize=quantize, aoti=aoti, memory=most, say=say
    )
    console = out()
    for file in sorted(Path(path).iterdir()) if Path(path).is_dir() else [Path(path)]:
        console.print(f"{file.stat().st_size:>12,}  {file}", soft_wrap=True)
    if quantize is not None:
        from linearize.export.manifest import read_manifest

        loss = read_manifest(path).quantization
        assert loss is not None
        console.print(
            f"{loss.kind}: perplexity {loss.perplexity:.3f} instead of {loss.perplexity_float32:.3f} on "
            f"{loss.tokens} of the model's own tokens, KL {loss.kl:.2g}; "
            f"{loss.bytes:,} bytes instead of {loss.bytes_float32:,}",
            soft_wrap=True,
        )
    console.print(f"wrote {path} in {time.perf_counter() - started:.0f} s", soft_wrap=True)
