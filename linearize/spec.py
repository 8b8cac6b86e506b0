"""The vocabulary: what an attention is, in frozen dataclasses that know nothing of torch.fx.

Nodes of a graph are named by strings, so a Site can be printed, saved and compared without the graph at hand.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

MaskKind = Literal["causal", "sliding", "chunked", "prefix", "full", "other"]


@dataclass(frozen=True)
class MaskSpec:
    """Which keys a query may see, read from the mask's values at a probe length, padding kept apart.

    `size` is the window (a query sees itself and the `size - 1` keys before it) or the chunk length, else 0.
    `from_first_token`: chunks start at a row's first real token, not at its first column.
    """

    kind: MaskKind
    size: int = 0
    padding: bool = False
    from_first_token: bool = False
    detail: str = ""

    def __str__(self) -> str:
        return f"{self.kind}({self.size})" if self.size else self.kind


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding, verified by value: linear in x, and q.k depends on the distance alone.

    `rotated_dims` of the head's dims change with the position; `pairs` says which dims rotate together.
    """

    rotated_dims: int
    pairs: Literal["half", "interleaved", "other"]

    def __str__(self) -> str:
        return f"rope-{self.pairs}({self.rotated_dims})"


@dataclass(frozen=True)
class AttentionSpec:
    """One softmax attention in the canonical form of the operator `linearize::attention`.

    `alibi` holds a slope per head: slope_h (j - i) is added to the score of query i and key j, positions counted over
    a row's real tokens (Press et al. 2022); () for none. `sinks`: a logit per head in every denominator.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    hidden_dim: int
    scale: float
    mask: MaskSpec
    softcap: float = 0.0
    sinks: bool = False
    alibi: tuple[float, ...] = ()
    rope: RopeSpec | None = None
    dtype: str = "float32"

    @property
    def groups(self) -> int:
        """Query heads per kv head."""
        return self.heads // self.kv_heads

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @staticmethod
    def from_dict(data: dict[str, Any]) -> AttentionSpec:
        rope = RopeSpec(**data["rope"]) if data.get("rope") else None
        return AttentionSpec(
            **{**data, "mask": MaskSpec(**data["mask"]), "rope": rope, "alibi": tuple(data.get("alibi") or ())}
        )


@dataclass(frozen=True)
class SiteNodes:
    """Names of the graph nodes around one attention. None: not recovered, so mixers that need it refuse the site.

    query [B,H,T,d], key [B,G,S,d], value [B,G,S,dv] after rotation, before any repeat over heads;
    query_unrotated / key_unrotated the same before the rotation (the same nodes where there is no rotation);
    hidden [B,T,D] is the block input that q, k and v are projected from; core's value is the output [B,H,T,dv].
    """

    core: str
    query: str
    key: str
    value: str
    mask: str | None = None
    sinks: str | None = None
    hidden: str | None = None
    query_unrotated: str | None = None
    key_unrotated: str | None = None


Role = Literal["query", "key", "value", "output"]


@dataclass(frozen=True)
class Projection:
    """y = x W^T + b [+ adapter_scale B A x], of whose channels `rows` are a query's, key's or value's, head by head.

    `parameter` is W, (out, in), or (in, out) where it is `transposed`; `rows` are runs (first, one past the last) of
    output channels in the order of the heads, () for all. `adapter` names A and B of a low-rank adapter.
    """

    role: Role
    parameter: str
    rows: tuple[tuple[int, int], ...] = ()
    bias: str = ""
    transposed: bool = False
    adapter: tuple[str, ...] = ()
    adapter_scale: float = 0.0

    def __str__(self) -> str:
        named = "columns" if self.transposed else "rows"
        runs = [f"{first}-{stop - 1}" for first, stop in self.rows]
        shown = ", ".join(runs if len(runs) <= 4 else [*runs[:3], f"... ({len(runs)} runs)"])
        parts = [f"{self.parameter} {named} {shown}" if runs else self.parameter]
        parts += [self.bias] if self.bias else []
        parts += [f"{self.adapter_scale:g} {self.adapter[1]} {self.adapter[0]}"] if self.adapter else []
        return f"{self.role}: " + " + ".join(parts)


@dataclass(frozen=True)
class Site:
    """An attention that was matched and validated against the canonical operator on random inputs.

    `projections` names the weights that q, k, v and the output meet, by data flow; `projected` holds those of which
    parameter and rows were proved by value. `positions` says where they come from: "rope", "alibi", "learned" or
    "fixed" (added to the activations), "none", or "unknown" where they enter the attention in another way.
    """

    index: int
    module: str
    attention: AttentionSpec
    nodes: SiteNodes
    projections: tuple[str, ...] = ()
    extras: tuple[str, ...] = ()
    near_misses: tuple[str, ...] = ()
    projected: tuple[Projection, ...] = ()
    positions: str = "unknown"

    matched = True
    reason = ""


@dataclass(frozen=True)
class NoMatch:
    """An attention (or a softmax that looks like one) that is left alone, and why.

    `chain` holds the program lines of `nodes`, the ones that were looked at, from the softmax on; `stopped_at` is the
    place in it of the one that stopped the match, None where a fact about all of them did. `source` is a file and line.
    """

    index: int
    module: str
    reason: str
    nodes: tuple[str, ...] = ()
    source: str = ""
    chain: tuple[str, ...] = field(default=())
    stopped_at: int | None = None

    matched = False
