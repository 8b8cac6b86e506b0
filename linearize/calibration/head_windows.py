"""Which window each kv head gets: the profile and the choice of MoA (Fu et al. 2024), by output error.

For a rule (alpha, beta) the window at length N is alpha + beta N. Profiled is, for every kv head and rule, the squared
error of its output with that window, at the calibration rows' length and at half of it, as a share of what the layer's
output varies. The choice minimises the sum over all heads under a mean window at the context that is meant: from the
cheapest rule on, the step along a head's convex hull that takes the most error away for each key, again and again.

MoA measures an attention weight's influence by its gradient; here it is the output's error. A loss's sensitivity to a
layer is the planner's concern (`linearize.planner`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from linearize.calibration.teacher import TeacherStream
from linearize.mixers.moa import head_windows
from linearize.progress import Progress
from linearize.spec import AttentionSpec

STARTS = (8, 16, 32, 64, 128, 256, 512)
GROWTHS = (0.0, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4)
RULES = tuple((alpha, beta) for alpha in STARTS for beta in GROWTHS)
Rules = Sequence[tuple[float, float]]
Head = tuple[int, int]  # site, kv head
Step = tuple[int, float]  # keys at the context, error


def choose_windows(
    stream: TeacherStream, sites: Sequence[int], context: int, mean: float, sinks: int, progress: Progress
) -> dict[int, list[tuple[float, float]]]:
    """{site: (alpha, beta) of each kv head} with at most `mean` keys a head at `context`, `sinks` apart."""
    errors: dict[Head, list[float]] = {}
    for site in progress.track(stream.walk(stream.program.matched), "profiling heads", total=len(sites)):
        if site.index in sites:
            profile = profile_heads(stream, site.attention, _values(stream, site), sinks)
            errors |= {(site.index, head): found for head, found in enumerate(profile)}
    costs = [head_windows(1, alpha, beta, context)[0] for alpha, beta in RULES]
    chosen = solve({head: list(zip(costs, found, strict=True)) for head, found in errors.items()}, mean * len(errors))
    rules: dict[int, list[tuple[float, float]]] = {}
    for (site_index, _), place in sorted(chosen.items()):
        rules.setdefault(site_index, []).append(RULES[place])
    return rules


def _values(stream: TeacherStream, site: object) -> list[list[Tensor]]:
    return [stream.site_values(site, (), batch)[0] for batch in range(len(stream.batches))]  # type: ignore[arg-type]


def profile_heads(
    stream: TeacherStream, spec: AttentionSpec, batches: list[list[Tensor]], sinks: int, rules: Rules = RULES
) -> list[list[float]]:
    """[G][rule]: the head's squared error over the variance of the whole output, mean over both lengths."""
    total = torch.zeros(spec.kv_heads, len(rules), dtype=torch.float64)
    for query, key, value in batches:
        for length in (query.shape[2] // 2, query.shape[2]):
            piece = [x[:, :, :length] for x in (query, key, value)]
            total += _errors(spec, piece, length, sinks, rules) / (2 * len(batches))
    return total.tolist()  # type: ignore[no-any-return]


def _errors(spec: AttentionSpec, piece: list[Tensor], length: int, sinks: int, rules: Rules) -> Tensor:
    """[G, rules] at one length."""
    index = torch.arange(length, device=piece[0].device)
    distance, first = index[:, None] - index, index < sinks
    exact = _attend(spec, piece, distance >= 0)
    variance = (exact - exact.mean()).double().square().sum()
    known: dict[int, Tensor] = {}
    for alpha, beta in rules:
        size = head_windows(1, alpha, beta, length)[0]
        if size not in known:
            o = _attend(spec, piece, (distance >= 0) & ((distance < size) | first))
            squares = (o - exact).double().square().sum(dim=(0, 2, 3))
            known[size] = squares.unflatten(0, (spec.kv_heads, -1)).sum(1).cpu() / variance.cpu()
    return torch.stack([known[head_windows(1, alpha, beta, length)[0]] for alpha, beta in rules], dim=1)


def _attend(spec: AttentionSpec, piece: list[Tensor], seen: Tensor) -> Tensor:
    output: Tensor = torch.ops.linearize.attention.default(*piece, seen, scale=spec.scale)
    return output


def solve(options: dict[Head, list[Step]], budget: float) -> dict[Head, int]:
    """The place of the option that each head takes: steps along the convex hulls, the one with the most error taken
    away for each key first, while their keys stay within `budget`. Every head takes its cheapest option at least."""
    hulls = {head: hull(steps) for head, steps in options.items()}
    taken = dict.fromkeys(hulls, 0)
    spent = sum(options[head][places[0]][0] for head, places in hulls.items())
    steps = sorted(
        (
            -_gain(options[head][places[i]], options[head][places[i + 1]]),
            head,
            i + 1,
            options[head][places[i + 1]][0] - options[head][places[i]][0],
        )
        for head, places in hulls.items()
        for i in range(len(places) - 1)
    )
    for _, head, place, keys in steps:
        if taken[head] == place - 1 and spent + keys <= budget:
            taken[head], spent = place, spent + keys
    return {head: hulls[head][place] for head, place in taken.items()}


def hull(steps: Sequence[Step]) -> list[int]:
    """Places of the options on the lower convex hull of (keys, error), from the cheapest to the best."""
    order = sorted(range(len(steps)), key=lambda place: steps[place])
    found: list[int] = []
    for place in order:
        if found and steps[place][1] >= steps[found[-1]][1]:
            continue
        while len(found) > 1 and _gain(steps[found[-2]], steps[found[-1]]) <= _gain(steps[found[-1]], steps[place]):
            found.pop()
        found.append(place)
    return found


def _gain(before: Step, after: Step) -> float:
    """Error taken away for each further key."""
    keys = after[0] - before[0]
    return (before[1] - after[1]) / keys if keys else float("inf")
