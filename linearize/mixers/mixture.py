"""Heads of one layer that differ: each part of the kv heads, with its query heads, has a mixer of its own.

parts = [{ mixer = "window", kv_heads = [0, 2], options = { window = 32 } }, { mixer = "lolcats", kv_heads = [1] }]

Every kv head belongs to exactly one part. Equals, head by head, what its parts equal before fitting. MoA (Fu et al.
2024: a window length by head) and softmax kept for retrieval heads alone are special cases.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from linearize.mixers.base import Mixer, build_mixer, mixer_class, register_mixer
from linearize.program import StateTensor
from linearize.spec import AttentionSpec, Site

BY_QUERY_HEAD = ("query", "query_unrotated")
BY_KV_HEAD = ("key", "value", "key_unrotated")


@register_mixer
class Mixture(Mixer):
    """Options: `parts`, a list of tables with `mixer`, `kv_heads` and perhaps `options`.

    State: that of every part, its names preceded by the part's number.
    """

    name = "mixture"
    starts_as = "head by head, what its parts start as"
    fits = True

    def __init__(self, spec: AttentionSpec, parts: list[dict[str, Any]]) -> None:
        super().__init__(spec, parts=parts)
        check_parts(parts, spec.kv_heads)
        self.parts = nn.ModuleList()
        order: list[int] = []
        for index, part in enumerate(parts):
            heads = query_heads(part["kv_heads"], spec.groups)
            alibi = tuple(spec.alibi[head] for head in heads) if spec.alibi else ()
            own = replace(spec, heads=len(heads), kv_heads=len(part["kv_heads"]), alibi=alibi)
            self.parts.append(build_mixer(part["mixer"], own, dict(part.get("options", {}))))
            self.register_buffer(f"heads_{index}", torch.tensor(heads), persistent=False)
            self.register_buffer(f"kv_heads_{index}", torch.tensor(part["kv_heads"]), persistent=False)
            order += heads
        self.register_buffer("order", torch.tensor(order).argsort(), persistent=False)
        needed = dict.fromkeys(need for part in self.parts for need in part.needs)  # type: ignore[union-attr]
        self.needs = tuple(needed)  # type: ignore[misc]

    @classmethod
    def refusal_with(cls, site: Site, options: dict[str, Any]) -> str | None:
        parts = options.get("parts") or []
        check_parts(parts, site.attention.kv_heads)
        if any(mixer_class(part["mixer"]).name == "share" for part in parts):
            return "mixture has no part that shares another site's cache: share is for a whole site"
        refused = (mixer_class(part["mixer"]).refusal_with(site, part.get("options", {})) for part in parts)
        return next((reason for reason in refused if reason is not None), None)

    def state(self) -> tuple[StateTensor, ...]:
        return tuple(
            replace(tensor, name=f"{index}_{tensor.name}")
            for index, part in enumerate(self.parts)
            for tensor in part.state()  # type: ignore[operator]
        )

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        names = ("query", "key", "value", *self.needs, "mask", "positions")
        given, state = dict(zip(names, inputs, strict=False)), inputs[len(names) :]
        outputs: list[Tensor] = []
        new: list[Tensor] = []
        for index, part in enumerate(self.parts):
            count = len(part.state())  # type: ignore[operator]
            own = [self._heads(name, given[name], index) for name in ("query", "key", "value", *part.needs)]  # type: ignore[misc]
            result = part(*own, given["mask"], given["positions"], *state[len(new) : len(new) + count])
            outputs.append(result[0])
            new += [result[1 + place] for place in range(count)]
        together = torch.cat([output.transpose(1, 2) for output in outputs], dim=2)
        return (torch.index_select(together, 2, self.order).transpose(1, 2), *new)  # type: ignore[arg-type]

    def _heads(self, name: str, tensor: Tensor, part: int) -> Tensor:
        """The part's own heads of an input; the hidden state has none."""
        if name in BY_QUERY_HEAD:
            return torch.index_select(tensor, 1, getattr(self, f"heads_{part}"))
        if name in BY_KV_HEAD:
            return torch.index_select(tensor, 1, getattr(self, f"kv_heads_{part}"))
        return torch.index_select(tensor, 0, getattr(self, f"heads_{part}")) if name == "sinks" else tensor

    def prepare(self, inputs: list[Tensor], target: Tensor) -> None:
        for part, own, aim in self._shares(inputs, target):
            part.prepare(own, aim)

    def parts_on(self, inputs: list[Tensor], target: Tensor) -> Iterator[tuple[Mixer, list[Tensor], Tensor]]:
        for part, own, aim in self._shares(inputs, target):
            yield from part.parts_on(own, aim)

    def _shares(self, inputs: list[Tensor], target: Tensor) -> Iterator[tuple[Mixer, list[Tensor], Tensor]]:
        """Every part with its own heads of the inputs and of the target."""
        given = dict(zip(("query", "key", "value", *self.needs), inputs, strict=True))
        for index, part in enumerate(self.parts):
            assert isinstance(part, Mixer)
            own = [self._heads(name, given[name], index) for name in ("query", "key", "value", *part.needs)]
            yield part, own, self._heads("query", target, index)


def query_heads(kv_heads: list[int], groups: int) -> list[int]:
    """The query heads that read these kv heads."""
    return [head * groups + member for head in kv_heads for member in range(groups)]


def check_parts(parts: Any, kv_heads: int) -> None:
    """Raise ValueError unless every kv head belongs to exactly one part."""
    if not isinstance(parts, list) or not all(isinstance(part, dict) for part in parts):
        raise ValueError("parts must be a list of tables with mixer, kv_heads and perhaps options")
    for part in parts:
        if set(part) - {"options"} != {"mixer", "kv_heads"}:
            raise ValueError(f"a part has mixer, kv_heads and perhaps options, not {sorted(part)}")
    taken = sorted(head for part in parts for head in part["kv_heads"])
    if taken != list(range(kv_heads)):
        raise ValueError(f"parts must take each of the {kv_heads} kv heads once; they take {taken}")
