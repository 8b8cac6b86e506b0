"""Whether a format can say what one mixer computes, tried on the mixer alone: for those that nobody has exported yet,
as a user's own. Those of `linearize.mixers` are exported by the tests."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from linearize.errors import ExportError
from linearize.export.ways import Way
from linearize.ops import decompositions


def operator_refusal(mixer: nn.Module, inputs: Sequence[Tensor], way: Way) -> str | None:
    """Why `way` cannot express what `mixer` does to `inputs` (of one shape; their values do not matter), or None."""
    try:
        _say(mixer, tuple(inputs), way)
    except ExportError as error:
        return str(error)
    return None


def _say(mixer: nn.Module, inputs: tuple[Tensor, ...], way: Way) -> None:
    if way.format == "onnx":
        from linearize.export.onnx import translate_module

        translate_module(mixer, inputs, None, "portable" in way.options, fx.Graph())
        return
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            exported = torch.export.export(mixer, inputs).run_decompositions(decompositions())
            if way.format == "torchscript":
                torch.jit.trace(exported.module(), inputs, check_trace=False)
        except Exception as error:  # torch.export's and torch.jit's errors have no common base
            raise ExportError(f"{way.format} stopped: {str(error).strip().splitlines()[0]}") from error
