"""Fit a mixer to its teacher by the relative MSE of its output: mean (y' - y)^2 / var(y)."""

from __future__ import annotations

import math
import time

import torch

from linearize.calibration.teacher import TeacherStream
from linearize.errors import DataError
from linearize.mixers import Mixer
from linearize.progress import Progress
from linearize.recipe import Fit
from linearize.report import SiteReport
from linearize.spec import Site


def output_error(mixer: Mixer, stream: TeacherStream, site: Site) -> float:
    """Relative MSE over all batches of the stream, sums in float64.

    Raises:
        DataError: the teacher's own output is not finite, or does not vary, so no error is defined.
    """
    squares, total, total_squares, count = 0.0, 0.0, 0.0, 0
    with torch.no_grad():
        for batch in range(len(stream.batches)):
            inputs, output = stream.site_values(site, mixer.needs, batch)
            y = output.double()
            squares += (mixer.run(inputs).double() - y).square().sum().item()
            total, total_squares = total + y.sum().item(), total_squares + y.square().sum().item()
            count += y.numel()
    variance = total_squares / count - (total / count) ** 2
    if not math.isfinite(variance):
        raise DataError(f"site {site.index} ({site.module}): the teacher's own output is not finite on this data")
    if variance <= 0:
        raise DataError(f"site {site.index} ({site.module}): the teacher's output does not vary on this data")
    return squares / count / variance


def fit_mixer(
    mixer: Mixer, train: TeacherStream, held: TeacherStream, site: Site, fit: Fit, row: SiteReport, progress: Progress
) -> None:
    """First what is found without gradients, then (`fit.passes` > 0) Adam on the relative MSE at a cosine rate; of
    start, prepared and fitted, the one with the smallest held-out error stays."""
    started = time.perf_counter()
    row.parameters = sum(parameter.numel() for parameter in mixer.parameters())
    row.error_start = row.error_fitted = output_error(mixer, held, site)
    if mixer.fits and train.batches:
        best = _copy(mixer)
        _prepare(mixer, train, site)
        best = _better(mixer, held, site, row, best)
        if fit.passes:
            _descend(mixer, train, site, fit, progress)
            best = _better(mixer, held, site, row, best)
        mixer.load_state_dict(best)
    row.seconds = round(time.perf_counter() - started, 2)


def _copy(mixer: Mixer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in mixer.state_dict().items()}


def _better(
    mixer: Mixer, held: TeacherStream, site: Site, row: SiteReport, best: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The mixer as it is now where its held-out error is the lowest so far (which goes into `row`), else `best`."""
    error, lowest = output_error(mixer, held, site), row.error_fitted
    if lowest is not None and not error <= lowest:
        return best
    row.error_fitted = error
    return _copy(mixer)


def _prepare(mixer: Mixer, train: TeacherStream, site: Site) -> None:
    with torch.no_grad():
        mixer.prepare(*train.site_values(site, mixer.needs, 0))


def _descend(mixer: Mixer, train: TeacherStream, site: Site, fit: Fit, progress: Progress) -> None:
    optimiser = torch.optim.Adam(mixer.parameters(), lr=fit.learning_rate)
    steps = fit.passes * len(train.batches)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: _cosine(step, steps))
    for step in progress.track(range(steps), f"site {site.index} {mixer.name}"):
        with torch.no_grad():
            inputs, output = train.site_values(site, mixer.needs, step % len(train.batches))
        loss = (mixer.run(inputs).float() - output.float()).square().mean() / output.float().var()
        if not torch.isfinite(loss):
            raise DataError(f"site {site.index} ({site.module}): the loss is not finite on batch {step}")
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(mixer.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        progress.note(f"relative MSE {loss.item():.4f}")


def _cosine(step: int, steps: int, warm: float = 0.05) -> float:
    """Factor of the learning rate: linear over the first 5 % of the steps, then half a cosine to 5 %."""
    warmup = max(1, int(steps * warm))
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * done))
