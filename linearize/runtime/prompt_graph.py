"""The graph of a prompt beside that of a step: over the same parameters, with the logits of the last token alone."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import fx, nn

from linearize.passes.lower.last_token import LastToken
from linearize.pipeline import Pass
from linearize.program import Program
from linearize.rewriting.editor import retarget
from linearize.verify import logits_node


class PromptGraph:
    """Made of `program` at the first prompt, lowered further by `passes`.

    Called on the module that holds the parameters, so that adapters in it count.
    """

    def __init__(self, program: Program, *passes: Pass) -> None:
        self.program, self.passes = program, passes

    def __call__(self, owner: nn.Module, *inputs: Any) -> Any:
        """What the program's graph gives, its logits cut to [B, 1, V]."""
        return type(self._module).forward(owner, *inputs)  # type: ignore[arg-type]

    @property
    def vocab_size(self) -> int | None:
        """The vocabulary if the logits of all tokens are computed after all, before they are cut: no other way was
        found. None where they are not."""
        return self.program.vocab_size if logits_node(self._module.graph).meta.get("rule") == LastToken.name else None

    def to(self, device: torch.device) -> None:
        """Constants that the graph makes are made on `device`."""
        retarget(self._module, device)

    @cached_property
    def _module(self) -> fx.GraphModule:
        prompt = LastToken().run(self.program)
        for step in self.passes:
            prompt = step.run(prompt)
        return prompt.module
