"""The decode step compiled once per shape by inductor, with the graph itself as the fallback.

A step's shapes never change (T = 1, a state of fixed size), so no guards are needed: the compiled function is looked up
by batch and device. On a GPU it is replayed as a CUDA graph. Prompts, gradients and caches that grow run the graph.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

Function = Callable[..., Any]


class CompiledStep:
    """Called as the graph is: `(input_ids, attention_mask, [position_ids,] *state)`.

    `reason` says why steps run uncompiled, '' while they do not.
    """

    def __init__(self, graph: fx.GraphModule, grows: bool = False) -> None:
        self.graph = graph
        self.functions: dict[tuple[int, torch.device], Function] = {}
        self.reason = "a kept softmax layer's cache grows with every token" if grows else ""

    def __call__(self, *inputs: Tensor) -> Any:
        ids = inputs[0]
        if self.reason or ids.shape[1] != 1 or torch.is_grad_enabled() or ids.is_meta:
            return self.graph(*inputs)
        inputs = tuple(tensor.contiguous() for tensor in inputs)  # a prompt leaves views; strides are compiled in
        key = (ids.shape[0], ids.device)
        if key not in self.functions and not self._compile(key, inputs):
            return self.graph(*inputs)
        return self.functions[key](*inputs)

    def _compile(self, key: tuple[int, torch.device], inputs: tuple[Tensor, ...]) -> bool:
        """Compile for these shapes; whether it worked. It is asked once: what fails is not tried again."""
        on_gpu = key[1].type == "cuda"
        options = {"triton.cudagraphs": True} if on_gpu else None
        try:
            compiled = torch._inductor.compile(self.graph, [tensor.clone() for tensor in inputs], options)
            compiled(*inputs)
        except Exception as error:  # no C++ compiler, an operator that inductor does not take, ...
            first = str(error).strip().splitlines()[0] if str(error).strip() else ""
            self.reason = f"{type(error).__name__}: {first}"
            warnings.warn(f"the decode step runs uncompiled: {self.reason}", RuntimeWarning, stacklevel=2)
            return False
        self.functions[key] = _with_own_outputs(compiled) if on_gpu else compiled
        return True

    def __deepcopy__(self, memo: dict[int, Any]) -> CompiledStep:
        """A copy compiles anew: compiled functions hold the parameters that they were made with."""
        import copy

        made = CompiledStep(copy.deepcopy(self.graph, memo))
        made.reason = self.reason
        return made


def _with_own_outputs(function: Function) -> Function:
    """A CUDA graph writes every result to the same memory; states are kept and forked, so they get their own."""

    def call(*inputs: Tensor) -> list[Tensor]:
        return [tensor.clone() for tensor in function(*inputs)]

    return call
