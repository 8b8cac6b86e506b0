"""Where a distillation stands, in memory and on disk: step, parameters, Adam's moments, and the best weights so far."""

from __future__ import annotations

import json
from typing import NamedTuple

import torch
from torch import Tensor, nn

from linearize.calibration.checkpoints import Checkpoints
from linearize.calibration.parallel import rank
from linearize.calibration.sharding import own_part, whole

NAME = "end-to-end"
KINDS = ("now", "best", "first", "second")


class Progressed(NamedTuple):
    """The next step, the held-out KL before the first, and the lowest so far."""

    step: int
    start: float
    lowest: float


class TrainingState:
    """`checkpoints` may be without a folder: then nothing is kept beyond the process."""

    def __init__(self, checkpoints: Checkpoints) -> None:
        self.checkpoints = checkpoints
        self.best: list[Tensor] = []

    def remember(self, parameters: list[nn.Parameter]) -> None:
        """The parameters as they are now are the best so far."""
        self.best = [parameter.detach().clone() for parameter in parameters]

    def put_back(self, parameters: list[nn.Parameter]) -> None:
        with torch.no_grad():
            for parameter, best in zip(parameters, self.best, strict=True):
                parameter.copy_(best)

    def keep(self, found: Progressed, parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer) -> None:
        """Write a checkpoint, complete or not at all: the first process does, of whole tensors, for which all of them
        have to call this where parameters are sharded.

        Raises:
            ArtifactError: it cannot be written; the one before stays.
        """
        if self.checkpoints.folder is None:
            return
        tensors: dict[str, Tensor] = {}
        for index, parameter in enumerate(parameters):
            moments = optimiser.state.get(parameter, {})
            first, second = moments.get("exp_avg"), moments.get("exp_avg_sq")
            for kind, value in zip(KINDS, (parameter, self.best[index], first, second), strict=True):
                if value is not None:
                    gathered = whole(value.detach())
                    tensors |= {f"{kind}.{index}": gathered.cpu()} if not rank() else {}
        if not rank():
            self.checkpoints.store(NAME, tensors, {"progress": json.dumps(found._asdict())})

    def restore(self, parameters: list[nn.Parameter], optimiser: torch.optim.Optimizer) -> Progressed | None:
        """Go on from what was kept: parameters, moments and best weights are set; None where nothing usable is."""
        stored = self.checkpoints.load(NAME)
        if stored is None:
            return None
        tensors, metadata = stored
        try:
            found = Progressed(**json.loads(metadata["progress"]))
            now = [own_part(tensors[f"now.{index}"], parameter) for index, parameter in enumerate(parameters)]
            self.best = [own_part(tensors[f"best.{index}"], parameter) for index, parameter in enumerate(parameters)]
        except (KeyError, ValueError, TypeError, RuntimeError):
            return None
        with torch.no_grad():
            for index, (parameter, value) in enumerate(zip(parameters, now, strict=True)):
                parameter.copy_(value)
                first, second = tensors.get(f"first.{index}"), tensors.get(f"second.{index}")
                if first is not None and second is not None:
                    optimiser.state[parameter] = {
                        "step": torch.tensor(float(found.step)), "exp_avg": own_part(first, parameter),
                        "exp_avg_sq": own_part(second, parameter),
                    }  # fmt: skip
        return found
