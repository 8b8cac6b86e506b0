"""Fit a mixer to its teacher by the relative MSE of its output: mean (y' - y)^2 / var(y)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import torch

from linearize.calibration.closed_form import fit_linear
from linearize.calibration.parallel import average_gradients, from_first, summed_numbers
from linearize.calibration.teacher import TeacherStream
from linearize.errors import DataError
from linearize.mixers import Mixer
from linearize.mixers.linear_part import HeadMaps
from linearize.progress import Progress
from linearize.recipe import Fit
from linearize.report import SiteReport
from linearize.spec import Site

LOOK_EVERY, LOOKS, PATIENCE = 8, 8, 3  # steps between looks at the held-out error, at most so many, worse ones in a row


def output_error(mixer: Mixer, stream: TeacherStream, site: Site) -> float:
    """Relative MSE over all batches of the stream, sums in float64.

    Raises:
        DataError: the teacher's own output is not finite, or does not vary, so no error is defined.
    """
    squares = total = total_squares = count = 0.0
    with torch.no_grad():
        for batch in range(len(stream.batches)):
            inputs, output = stream.site_values(site, mixer.needs, batch)
            y = output.double()
            squares += (mixer.run(inputs).double() - y).square().sum().item()
            total, total_squares = total + y.sum().item(), total_squares + y.square().sum().item()
            count += y.numel()
    squares, total, total_squares, count = summed_numbers(squares, total, total_squares, count)
    variance = total_squares / count - (total / count) ** 2
    if not math.isfinite(variance):
        raise DataError(f"site {site.index} ({site.module}): the teacher's own output is not finite on this data")
    if variance <= 0:
        raise DataError(f"site {site.index} ({site.module}): the teacher's output does not vary on this data")
    return squares / count / variance


def fit_mixer(
    mixer: Mixer, train: TeacherStream, held: TeacherStream, site: Site, fit: Fit, row: SiteReport, progress: Progress
) -> None:
    """In closed form first: searches on one batch, then ridge regression on all. Then (`fit.passes` > 0) Adam on the
    relative MSE at a cosine rate, until the held-out error has stopped falling, and the regression again. Of all these
    states the one with the smallest held-out error stays."""
    started = time.perf_counter()
    row.parameters = sum(parameter.numel() for parameter in mixer.parameters())
    row.error_start = row.error_fitted = output_error(mixer, held, site)
    if mixer.fits and train.batches:
        best = Best(mixer, held, site, row)
        _prepare(mixer, train, site)
        if not mixer.may_stay_as_started:
            row.error_fitted = None
        best.look()
        _regress(mixer, train, site, best)
        row.error_closed = row.error_fitted
        if fit.passes and any(True for _ in mixer.parameters()):
            _descend(mixer, train, site, fit, best, progress)
            _regress(mixer, train, site, best)
        best.restore()
    row.seconds = round(time.perf_counter() - started, 2)


class Best:
    """The state of a mixer with the smallest held-out error seen so far, which stands in `row.error_fitted`."""

    def __init__(self, mixer: Mixer, held: TeacherStream, site: Site, row: SiteReport) -> None:
        self.mixer, self.held, self.site, self.row = mixer, held, site, row
        self.state = self._copy()

    def look(self) -> float:
        """The error now; the state is remembered if none was smaller."""
        error, lowest = output_error(self.mixer, self.held, self.site), self.row.error_fitted
        if lowest is None or error <= lowest:
            self.row.error_fitted = error
            self.state = self._copy()
        return error

    def restore(self) -> None:
        self.mixer.load_state_dict(self.state)

    def _copy(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.mixer.state_dict().items()}


def _prepare(mixer: Mixer, train: TeacherStream, site: Site) -> None:
    with torch.no_grad():
        mixer.prepare(*train.site_values(site, mixer.needs, 0))
    from_first(mixer)


def _regress(mixer: Mixer, train: TeacherStream, site: Site, best: Best) -> None:
    if not any(isinstance(module, Mixer) and module.linear_part() is not None for module in mixer.modules()):
        return
    with torch.no_grad():
        fit_linear(mixer, train, site)
    best.look()


def _descend(mixer: Mixer, train: TeacherStream, site: Site, fit: Fit, best: Best, progress: Progress) -> None:
    optimiser = torch.optim.Adam(parameter_groups(mixer, fit.learning_rate))
    steps = fit.passes * -(-train.total // train.step)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _cosine(step, steps))
    patience = Patience(max(LOOK_EVERY, steps // LOOKS))
    for step in progress.track(range(steps), f"site {site.index} {mixer.name}"):
        with torch.no_grad():
            inputs, output = train.site_values(site, mixer.needs, step % len(train.batches))
        loss = (mixer.run(inputs).float() - output.float()).square().mean() / output.float().var()
        if not torch.isfinite(loss):
            raise DataError(f"site {site.index} ({site.module}): the loss is not finite on batch {step}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(mixer.parameters())
        torch.nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress.note(f"relative MSE {loss.item():.4f}")
        if step + 1 < steps and patience.is_over(step, best.look):
            break
    else:
        best.look()


def parameter_groups(mixer: Mixer, learning_rate: float) -> list[dict[str, Any]]:
    """What was found by regression moves at a tenth of the rate: a map has dv entries for each number of its output."""
    solved = {id(p) for module in mixer.modules() if isinstance(module, HeadMaps) for p in module.parameters()}
    parameters = list(mixer.parameters())
    slow, fast = [p for p in parameters if id(p) in solved], [p for p in parameters if id(p) not in solved]
    groups = [{"params": fast, "lr": learning_rate}, {"params": slow, "lr": 0.1 * learning_rate}]
    return [group for group in groups if group["params"]]


class Patience:
    """Looks every `every` steps; over once PATIENCE looks in a row were no better than the best before them."""

    def __init__(self, every: int) -> None:
        self.every, self.lowest, self.worse = every, math.inf, 0

    def is_over(self, step: int, look: Callable[[], float]) -> bool:
        if (step + 1) % self.every:
            return False
        error = look()
        self.worse = 0 if error < self.lowest else self.worse + 1
        self.lowest = min(self.lowest, error)
        return self.worse >= PATIENCE


def _cosine(step: int, steps: int, warm: float = 0.05) -> float:
    """Factor of the learning rate: linear over the first 5 % of the steps, then half a cosine to 5 %."""
    warmup = max(1, int(steps * warm))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
