"""The contract of a mixer, and the registry of mixers by name.

A mixer is one `nn.Module` over the operators of `linearize.ops`. Its forward is written once and is traced into the
graph; the parallel, chunked, one-step and export forms are that forward with the operators' forms (reference, CPU or
GPU kernel, T = 1, decomposition).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from linearize.errors import RecipeError
from linearize.mixers.linear_part import LinearPart
from linearize.program import StateTensor
from linearize.spec import AttentionSpec, Site


class Mixer(nn.Module):
    """Replaces one softmax attention.

    Subclasses set `name`, list in `needs` the inputs beyond query, key and value that they want (fields of
    `SiteNodes`), say in `starts_as` what they equal before any fitting, and write `state` and `forward`. With `fits`
    what `prepare` and gradients find is kept where the held-out error falls, or whatever it does where what they start
    as is no candidate (`may_stay_as_started` is False).

    forward(query [B,H,T,d], key [B,G,T,d], value [B,G,T,dv], *needed, mask bool [B,T], positions int64 [B,T], *state)
    -> (output [B,H,T,dv], *new_state). `mask` is True for real tokens; `positions` counts a row's real tokens from 0.
    Outputs at masked tokens are unspecified but finite. States come back in the order of `state()`. forward is traced
    into the graph, so it reads no sizes from its inputs and branches on nothing but the mixer's own options.
    """

    name: ClassVar[str]
    needs: ClassVar[tuple[str, ...]] = ()
    starts_as: ClassVar[str] = ""
    fits: ClassVar[bool] = False
    may_stay_as_started: ClassVar[bool] = True

    def __init__(self, spec: AttentionSpec, **options: Any) -> None:
        super().__init__()
        self.spec = spec
        self.options = options
        self.dtype = getattr(torch, spec.dtype)

    @classmethod
    def refusal(cls, site: Site) -> str | None:
        """Why this mixer cannot replace the site, or None."""
        missing = cls.missing(site)
        if missing:
            return missing
        if site.attention.softcap:
            return f"{cls.name} does not carry the soft-cap of {site.attention.softcap:g}"
        if site.attention.sinks:
            return f"{cls.name} does not carry the teacher's sink logits"
        if site.attention.alibi:
            return f"{cls.name} does not carry the teacher's linear position bias (ALiBi)"
        if site.attention.mask.kind == "chunked":
            return f"{cls.name} does not carry the teacher's chunks of {site.attention.mask.size}"
        return None

    @classmethod
    def missing(cls, site: Site) -> str | None:
        """Which of `needs` the site does not have, as a reason; None where it has them all."""
        missing = [need for need in cls.needs if getattr(site.nodes, need) is None]
        if not missing:
            return None
        detail = f" ({site.near_misses[0]})" if site.near_misses else ""
        return f"{cls.name} needs {', '.join(missing)}, not recovered here{detail}"

    @classmethod
    def refusal_with(cls, site: Site, options: dict[str, Any]) -> str | None:
        """The same, for mixers whose options decide."""
        return cls.refusal(site)

    def state(self) -> tuple[StateTensor, ...]:
        """The tensors that the mixer carries from call to call."""
        raise NotImplementedError

    def prepare(self, inputs: list[Tensor], target: Tensor) -> None:
        """Set what can be found without gradients, from one batch: `inputs` are forward's up to `mask`, `target` the
        teacher's output [B,H,T,dv]. Called once before gradient fitting; the default does nothing."""

    def linear_part(self) -> LinearPart | None:
        """What the output is linear in, for ridge regression on all the data (`calibration.closed_form`); or None."""
        return None

    def parts_on(self, inputs: list[Tensor], target: Tensor) -> Iterator[tuple[Mixer, list[Tensor], Tensor]]:
        """(mixer, its inputs, its target) of everything here that has a linear part of its own."""
        if self.linear_part() is not None:
            yield self, inputs, target

    def run(self, inputs: list[Tensor]) -> Tensor:
        """The output [B,H,T,dv] on whole sequences without padding, from an empty state."""
        batch, _, length, _ = inputs[0].shape
        device = inputs[0].device
        mask = torch.ones(batch, length, dtype=torch.bool, device=device)
        positions = torch.arange(length, device=device).expand(batch, length)
        output: Tensor = self(*inputs, mask, positions, *(tensor.zeros(batch, device) for tensor in self.state()))[0]
        return output

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value}" for key, value in self.options.items())


_REGISTRY: dict[str, type[Mixer]] = {}


def register_mixer(cls: type[Mixer]) -> type[Mixer]:
    """Class decorator: make a mixer available to recipes and plans under its `name`."""
    known = _REGISTRY.get(cls.name)
    if known is not None and known.__qualname__ != cls.__qualname__:
        raise RecipeError(f"a mixer named {cls.name!r} exists already: {known.__qualname__}")
    _REGISTRY[cls.name] = cls
    return cls


def mixer_names() -> list[str]:
    return sorted(_REGISTRY)


def mixer_class(name: str) -> type[Mixer]:
    """The mixer of that name.

    Raises:
        RecipeError: none has it; the message lists the names.
    """
    if name not in _REGISTRY:
        raise RecipeError(f"no mixer named {name!r}; there are {', '.join(mixer_names())}")
    return _REGISTRY[name]


def build_mixer(name: str, spec: AttentionSpec, options: dict[str, Any]) -> Mixer:
    """A mixer at its initialisation.

    Raises:
        RecipeError: unknown name, or options that it does not take or that are out of range.
    """
    cls = mixer_class(name)
    try:
        return cls(spec, **options)
    except (TypeError, ValueError) as error:
        raise RecipeError(f"mixer {name} does not take the options {options}: {error}") from error


def tokens_first(tensor: Tensor) -> Tensor:
    """[B, heads, T, d] <-> [B, T, heads, d]."""
    return tensor.transpose(1, 2)
