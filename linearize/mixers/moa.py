"""MoA (Fu et al. 2024, arXiv 2406.14909): every head its own window, by an elastic rule of the length.

    w_g = min(ceil(start_g + growth_g N), N)         equation 2's span alpha + beta N, N the length
    y_i = softmax over the last w_g tokens and the first `sinks`, for the query heads of kv head g

N is `context`: a state has one shape, so the lengths are worked out for the context that the model is meant for, and
are right for shorter texts too (the first N tokens are then all seen). As keys and values are kept by kv head, so are
the windows. The rule's numbers come from the recipe `moa` (`linearize.calibration.head_windows`), or from you.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from linearize.mixers.base import Mixer, register_mixer
from linearize.mixers.mixture import Mixture
from linearize.spec import AttentionSpec, Site


@register_mixer
class Moa(Mixture):
    """Options: `start` and `growth`, a number for all kv heads or a list with one for each; `context` N; `sinks`.

    State: a window for each length that occurs, over the kv heads that have it (`mixture`).
    """

    name = "moa"
    starts_as = "the teacher's softmax, by kv head over its own last keys and the first `sinks`"
    fits = False

    def __init__(
        self, spec: AttentionSpec, start: float | Sequence[float] = 64, growth: float | Sequence[float] = 0.0,
        context: int = 4096, sinks: int = 0,
    ) -> None:  # fmt: skip
        windows = head_windows(spec.kv_heads, start, growth, context)
        parts = [
            {"mixer": "window", "kv_heads": [g for g in range(spec.kv_heads) if windows[g] == size],
             "options": {"window": size, "sinks": sinks}}
            for size in sorted(set(windows))
        ]  # fmt: skip
        super().__init__(spec, parts)
        self.options = {"start": start, "growth": growth, "context": context, "sinks": sinks}
        self.windows = windows

    @classmethod
    def refusal_with(cls, site: Site, options: dict[str, Any]) -> str | None:
        lists = [value for key in ("start", "growth") if isinstance(value := options.get(key), list | tuple)]
        wrong = [len(value) for value in lists if len(value) != site.attention.kv_heads]
        if wrong:
            return f"moa has {wrong[0]} windows for {site.attention.kv_heads} kv heads"
        return Mixer.refusal.__func__(cls, site)  # type: ignore[attr-defined, no-any-return]


def head_windows(
    kv_heads: int, start: float | Sequence[float], growth: float | Sequence[float], context: int
) -> list[int]:
    """w_g of the module docstring.

    Raises:
        ValueError: a list has not one number for each kv head, or a window would be empty.
    """
    starts, growths = ([x] * kv_heads if isinstance(x, int | float) else list(x) for x in (start, growth))
    if len(starts) != kv_heads or len(growths) != kv_heads:
        raise ValueError(f"start and growth must be a number, or one for each of the {kv_heads} kv heads")
    if context < 1 or min(starts) < 0 or min(growths) < 0:
        raise ValueError("context must be at least 1, start and growth at least 0")
    windows = [min(math.ceil(a + b * context), context) for a, b in zip(starts, growths, strict=True)]
    if min(windows) < 1:
        raise ValueError(f"the windows {windows} must all be at least 1")
    return windows
