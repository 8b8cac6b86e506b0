"""What a site, or one kv head of it, may become.

Sizes that matter are shares of the context. Where rows to measure on are shorter than the context, a candidate is
scored with its `slots` (or a window of more than `LOCAL` keys) at the same number per token, so that it is as tight
there as it will be.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from linearize.mixers import mixer_class
from linearize.spec import Site

Options = tuple[tuple[str, Any], ...]
LOCAL = 128
SHARES = (1 / 256, 1 / 128, 1 / 64, 1 / 32, 1 / 16, 1 / 8, 1 / 4, 1 / 2)
WINDOW_SHARES = (1 / 8, 1 / 2)
LATENT_SHARES = (0.25, 0.5)
EVICTING_SHARES = (1 / 64, 1 / 8)
EVICTING: tuple[tuple[str, dict[str, Any]], ...] = (  # H2O, CItruS, Q-Filters
    ("citrus", {"window": 32, "memory": 1.0}), ("citrus", {"window": 32, "memory": 0.0}), ("q_filters", {"window": 32}),
)  # fmt: skip
SIZES = {  # mixer: the options that grow with the context
    "slots": ("slots",), "window": ("window",), "citrus": ("keep",), "q_filters": ("keep",),
}  # fmt: skip
SLOTS: dict[str, Any] = {"window": 32, "rounds": 4, "decay": 0.97}
WHOLE = ("mla", "mixture", "moa", "share")  # their heads share a state, or they are made of heads already


@dataclass(frozen=True)
class Candidate:
    """A mixer with its options at the planned context, and `scored`, the options that it is measured with."""

    mixer: str
    options: Options = ()
    scored: Options = ()

    @property
    def by_head(self) -> bool:
        """Whether it may stand at some kv heads of a site alone."""
        return self.mixer not in WHOLE

    @property
    def of(self) -> int | None:
        """The site whose cache it reads; None for what has its own."""
        return int(dict(self.options)["of"]) if self.mixer == "share" else None

    @property
    def label(self) -> str:
        """`slots{slots=96,window=32}`"""
        shown = ",".join(f"{key}={value}" for key, value in self.options)
        return f"{self.mixer}{{{shown}}}" if shown else self.mixer

    @property
    def measured_as(self) -> str:
        shown = ",".join(f"{key}={value}" for key, value in self.scored)
        return f"{self.mixer}{{{shown}}}" if shown else self.mixer

    @property
    def size(self) -> float | None:
        """The option that grows with the context, by which neighbours are interpolated; None without one."""
        names = [name for name in SIZES.get(self.mixer, ()) if name in dict(self.options)]
        return float(dict(self.options)[names[0]]) if names else None

    def refusal(self, site: Site) -> str | None:
        return mixer_class(self.mixer).refusal_with(site, dict(self.options))


def candidate(mixer: str, options: dict[str, Any], context: int, length: int) -> Candidate:
    """One candidate at `context`, to be measured on rows of `length` tokens."""
    scored = dict(options)
    for name in SIZES.get(mixer, ()):
        value = options.get(name, 0)
        if length < context and (name != "window" or value > LOCAL):
            scored[name] = max(1, round(value * length / context))
    return Candidate(mixer, tuple(sorted(options.items())), tuple(sorted(scored.items())))


def scored_options(mixer: str, options: dict[str, Any], context: int, length: int) -> dict[str, Any]:
    """The options to measure any mixer with on rows of `length` tokens, those of the parts of a mixture included."""
    if mixer != "mixture":
        return dict(candidate(mixer, options, context, length).scored)
    parts = [
        {**part, "options": scored_options(part["mixer"], part.get("options", {}), context, length)}
        for part in options["parts"]
    ]
    return {"parts": parts}


def default_candidates(context: int, length: int, head_dim: int = 64) -> list[Candidate]:
    """What is measured unless the caller says otherwise, dearest last; `keep` and `drop` are always there."""
    made: list[tuple[str, dict[str, Any]]] = [("drop", {}), ("window", {"window": 64, "sinks": 4})]
    windows = [int(context * share) for share in WINDOW_SHARES if context * share > LOCAL]
    made += [("window", {"window": window, "sinks": 4}) for window in windows]
    made += [("moments", {"window": 64, "sinks": 4})]
    made += [("lolcats", {"window": 64, "features": head_dim, "sinks": 4})]
    sizes = sorted({max(8, round(context * share)) for share in SHARES})
    made += [("slots", {**SLOTS, "slots": size}) for size in sizes]
    kept = [round(context * share) for share in EVICTING_SHARES if context * share >= 8]
    for mixer, options in EVICTING:
        made += [(mixer, {**options, "keep": size}) for size in kept]
    made += [("streaming", {"window": 64, "sinks": 4})]
    made += [("mla", {"cache": share}) for share in LATENT_SHARES]
    made += [("keep", {})]
    return [candidate(mixer, options, context, length) for mixer, options in made]

