"""How a compiled model is distilled whole, after its layers were fitted: a section of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

FULL_FROM = 50_000_000  # tokens: LoLCATs and Lizard succeed with adapters at 20-40M, RADLADS finds them harmful above


class Distill(BaseModel):
    """End-to-end distillation: first hidden states and mixer outputs, then KL to the teacher's logits.

    tokens: to train on; 0 for none.
    lengths: contexts in turn, shortest first; the first `hidden_share` of the tokens goes to hidden states and mixer
        outputs at the first of them, the rest in equal parts to KL at each.
    batch: rows a step at the first length; a step has as many tokens at every length, and one row at least.
    learning_rate: AdamW's, at a cosine rate; maps that were solved for and whole projections move at a tenth of it.
    trainable: the mixers' parameters always; beside them low-rank adapters of the attention's projections, or these
        whole. "auto" takes adapters below 50M tokens.
    rank: of the adapters.
    window_dropout: share of the steps in which every window is cut to one token, so that the far field has to answer.
    shard: on several processes, each keeps a part of what is trained, of its gradients and of Adam's moments (FSDP2).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tokens: int = Field(default=0, ge=0)
    lengths: tuple[int, ...] = Field(default=(512, 1024), min_length=1)
    batch: int = Field(default=4, ge=1)
    learning_rate: float = Field(default=5e-3, gt=0)
    trainable: Literal["auto", "adapters", "full"] = "auto"
    rank: int = Field(default=16, ge=1)
    hidden_share: float = Field(default=0.25, ge=0, lt=1)
    window_dropout: float = Field(default=0.1, ge=0, lt=1)
    shard: bool = True

    @property
    def full(self) -> bool:
        """Whether whole projections are trained rather than adapters."""
        return self.trainable == "full" or (self.trainable == "auto" and self.tokens >= FULL_FROM)
