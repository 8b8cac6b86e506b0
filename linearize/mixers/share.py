"""Softmax over another layer's keys and values (KVSharer, Yang et al. 2024, arXiv 2410.18517; YOCO, Sun et al. 2024).

    y_i = softmax_j(scale q_i.k'_j) v'_j      q of this layer; k', v' the cache of the site `of`, which stands before it

The layer's own keys and values are no longer computed. Equals the teacher where both layers' keys and values are the
same. Which layers may share is found on data: recipe `kvsharer` (`linearize.calibration.kv_sharing`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from linearize.mixers.base import register_mixer
from linearize.mixers.cached import CachedAttention
from linearize.program import StateTensor
from linearize.spec import AttentionSpec, Site


@register_mixer
class Share(CachedAttention):
    """Option: `of`, the index of the site whose cache is read; it must be planned as `keep`.

    State: cache_mask [S], one byte a token; the keys and values are the other site's.
    """

    name = "share"
    starts_as = "softmax of its own queries over another layer's keys and values"

    def __init__(self, spec: AttentionSpec, of: int) -> None:
        super().__init__(spec, of=of)
        self.of = of
        self.needs = (f"key@{of}", f"value@{of}", *self.needs)  # type: ignore[misc]

    @classmethod
    def refusal(cls, site: Site) -> str | None:
        return None

    @classmethod
    def refusal_with(cls, site: Site, options: dict[str, Any]) -> str | None:
        of = options.get("of")
        if not isinstance(of, int) or of < 0:
            raise ValueError(f"of must be the index of a site, not {of!r}")
        return None if of < site.index else f"share reads the cache of a site before it, and {of} is none"

    def state(self) -> tuple[StateTensor, ...]:
        return (self.cache_mask,)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> tuple[Tensor, ...]:
        """`rest` is the other site's keys [B,G,S,d] and values [B,G,S,dv], all so far, (sinks [H], if the spec has
        them,) mask, positions, cache_mask. Own `key` and `value` are not read."""
        keys, values, *sinks, mask, _positions, cache_mask = rest
        seen = torch.cat([cache_mask, mask], 1)
        return self.attend(query, keys, values, sinks, seen, mask), seen


def sharing_problem(site: Site, source: Site | None, planned: str) -> str | None:
    """Why `site` cannot read the cache of `source`, which becomes a `planned` mixer; None where it can."""
    if source is None:
        return "it shares the cache of a site that was not matched"
    where = f"site {source.index} ({source.module})"
    if planned != "keep":
        return f"it shares the cache of {where}, which becomes {planned} and has none: keep it, or share another's"
    own, other = site.attention, source.attention
    for what in ("kv_heads", "head_dim", "value_dim", "dtype"):
        if getattr(own, what) != getattr(other, what):
            return f"it shares the cache of {where}, whose {what} is {getattr(other, what)}, not {getattr(own, what)}"
    if own.rope != other.rope:
        return f"it shares the cache of {where}, whose keys are rotated as {other.rope}, not {own.rope}"
    return None
