"""The bases of MLA (see `mla.py`): at full rank, and from the statistics of q, k and v.

A component is one rotary pair of one (mixed) kv head, two numbers: G R / 2 of them for R rotated dims a head. Dims that
are never rotated stand apart. Everything here is float64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from linearize.spec import AttentionSpec

BALANCES = (0.25, 0.5, 1.0, 2.0, 4.0)  # weight of the scores' error against the values' error
DAMPING = 1e-6


class Bases(NamedTuple):
    """The mixer's parameters under their names; legend in `mla.py`."""

    down_key: Tensor  # A [G,d,r]
    down_value: Tensor  # B [G,dv,r]
    down_bias: Tensor  # c0 [r]
    rope_key: Tensor  # R [G,d,p]
    latent_query: Tensor  # P [H,d,r]
    rope_query: Tensor  # Q [H,d,p]
    up_value: Tensor  # U [H,r,dv]
    up_bias: Tensor  # u [G,dv]


class KeyBasis(NamedTuple):
    """Mixed key dims of all heads as columns, the p rotated ones and the n others: keys are mapped by the same matrices
    as queries are, since each whole is orthogonal. [G,d,p], [G,d,n]."""

    rotated: Tensor
    plain: Tensor


def full_bases(spec: AttentionSpec, rank: int, rope_dims: int) -> Bases:
    """Identity bases: the fastest pairs rotated; of values and the other key dims the first r in the latent."""
    groups = spec.kv_heads
    order = torch.arange(groups * len(pair_dims(spec)))  # pairs in order of wavelength, heads within a pair
    basis = key_basis(spec, torch.eye(groups).double().expand(len(pair_dims(spec)), groups, groups), order, rope_dims)
    width = groups * spec.value_dim + basis.plain.shape[-1]
    up = torch.eye(width, rank).double()
    return assemble(spec, basis, up.T, up, torch.zeros(width).double())


def fit_bases(
    spec: AttentionSpec, rank: int, rope_dims: int,
    query: Tensor, key: Tensor, value: Tensor, plain_query: Tensor, plain_key: Tensor,
) -> Iterator[Bases]:  # fmt: skip
    """One set of bases for each of `BALANCES`. q [B,H,T,d], k [B,G,T,d], v [B,G,T,dv], float64."""
    gain = rotation_gain(spec, query, key, plain_query, plain_key)
    plain_query = plain_query * gain
    mixing = head_rotations(spec, plain_key)
    order = order_of_pairs(spec, mixing, query, key, plain_query, plain_key)
    basis = key_basis(spec, mixing, order, rope_dims)
    z = torch.cat([flat(value), flat_map(plain_key, basis.plain)], -1)
    mean = z.mean(0)
    covariance = (z - mean).T @ (z - mean) / len(z)
    scores = _score_metric(spec, basis, plain_query)
    values = spec.kv_heads * spec.value_dim
    for balance in BALANCES:
        weight = torch.block_diag(torch.eye(values).double(), balance * scores)
        down, up = weighted_pca(covariance, weight, rank)
        bases = assemble(spec, basis, down, up, mean)
        yield bases._replace(latent_query=bases.latent_query * gain.unsqueeze(-1).float())


def rotation_gain(spec: AttentionSpec, query: Tensor, key: Tensor, plain_query: Tensor, plain_key: Tensor) -> Tensor:
    """[d]: by what un-rotated query dims must be multiplied. Rotations keep lengths, but YaRN's scale both q and k."""
    gain = torch.ones(spec.head_dim).double().to(query.device)
    dims = [dim for pair in pair_dims(spec) for dim in pair]
    if dims:
        gain[dims] = query[..., dims].norm() / plain_query[..., dims].norm()
        gain[dims] *= key[..., dims].norm() / plain_key[..., dims].norm()
    return gain


def pair_dims(spec: AttentionSpec) -> list[tuple[int, int]]:
    """The dims of a head that rotate together, fastest first."""
    rotated = spec.rope.rotated_dims if spec.rope else 0
    half = rotated // 2
    if spec.rope is not None and spec.rope.pairs == "interleaved":
        return [(2 * i, 2 * i + 1) for i in range(half)]
    return [(i, i + half) for i in range(half)]


def head_rotations(spec: AttentionSpec, plain_key: Tensor) -> Tensor:
    """[pairs, G, G]: rows are the principal directions over heads of every pair, real and imaginary part alike."""
    made = []
    for real, imaginary in pair_dims(spec):
        x, y = (plain_key[..., dim].transpose(0, 1).flatten(1) for dim in (real, imaginary))
        _, vectors = torch.linalg.eigh(x @ x.T + y @ y.T)
        made.append(vectors.flip(-1).T)
    groups = plain_key.shape[1]
    return torch.stack(made) if made else torch.zeros(0, groups, groups).double()


def order_of_pairs(
    spec: AttentionSpec, mixing: Tensor, query: Tensor, key: Tensor, plain_query: Tensor, plain_key: Tensor
) -> Tensor:
    """Components (pair * G + component), those first whose rotation the scores need most: the mean squared change of a
    score, weighted by the teacher's attention, when that component is not rotated."""
    groups, pairs = mixing.shape[1], pair_dims(spec)
    weights = _attention(spec, query, key)
    harm = torch.zeros(len(pairs) * groups).double()
    for index, dims in enumerate(pairs):
        for component in range(groups):
            mixed_key = torch.einsum("g,bgtd->btd", mixing[index, component], key[..., dims])
            mixed_plain = torch.einsum("g,bgtd->btd", mixing[index, component], plain_key[..., dims])
            share = mixing[index, component].repeat_interleave(spec.groups)[None, :, None, None]
            change = (query[..., dims] * share) @ mixed_key.transpose(1, 2).unsqueeze(1)
            change = change - (plain_query[..., dims] * share) @ mixed_plain.transpose(1, 2).unsqueeze(1)
            harm[index * groups + component] = (weights * change.square()).sum()
    return harm.argsort(descending=True, stable=True)


def _attention(spec: AttentionSpec, query: Tensor, key: Tensor) -> Tensor:
    length = query.shape[2]
    scores = spec.scale * query @ key.repeat_interleave(spec.groups, 1).transpose(-1, -2)
    hidden = torch.ones(length, length, dtype=torch.bool, device=query.device).triu(1)
    if spec.mask.kind == "sliding":
        hidden |= torch.ones_like(hidden).tril(-spec.mask.size)
    return scores.masked_fill(hidden, float("-inf")).softmax(-1)


def key_basis(spec: AttentionSpec, mixing: Tensor, order: Tensor, rope_dims: int) -> KeyBasis:
    """Columns for the first p / 2 components of `order`, and for all other dims."""
    groups, pairs = spec.kv_heads, pair_dims(spec)
    columns = []
    for number in order.tolist():
        index, component = divmod(number, groups)
        for dim in pairs[index]:
            column = torch.zeros(groups, spec.head_dim).double()
            column[:, dim] = mixing[index, component].to(column.device)
            columns.append(column)
    never = [dim for dim in range(spec.head_dim) if not any(dim in pair for pair in pairs)]
    for group in range(groups):
        for dim in never:
            column = torch.zeros(groups, spec.head_dim).double()
            column[group, dim] = 1.0
            columns.append(column)
    whole = torch.stack(columns, -1)
    return KeyBasis(whole[..., :rope_dims], whole[..., rope_dims:])


def _score_metric(spec: AttentionSpec, basis: KeyBasis, plain_query: Tensor) -> Tensor:
    """[n, n]: E[ scale^2 q~ q~^T ] over all heads, q~ the query in the plain key dims."""
    plain = basis.plain.repeat_interleave(spec.groups, 0)
    mapped = torch.einsum("bhtd,hdn->bthn", plain_query, plain).flatten(0, 2)
    return spec.scale**2 * mapped.T @ mapped / max(len(mapped), 1)


def weighted_pca(covariance: Tensor, weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(down [r, m], up [m, r]) that minimise E | S (z - up down z) |^2, S = W^1/2, for cov(z) = C: down = V^T S and
    up = S^-1 V with V the r leading eigenvectors of S C S."""
    values, vectors = torch.linalg.eigh(weight)
    values = values.clamp_min(DAMPING * values.max())
    root, inverse = (vectors * values.sqrt()) @ vectors.T, (vectors / values.sqrt()) @ vectors.T
    _, leading = torch.linalg.eigh(root @ covariance @ root)
    leading = leading.flip(-1)[:, :rank]
    return leading.T @ root, inverse @ leading


def assemble(spec: AttentionSpec, basis: KeyBasis, down: Tensor, up: Tensor, mean: Tensor) -> Bases:
    """Fold z ~ mean + up down (z - mean), z = [v of all heads ; plain key dims], into the mixer's maps."""
    groups, dv, rank = spec.kv_heads, spec.value_dim, down.shape[0]
    values = groups * dv
    up_value = up[:values].reshape(groups, dv, rank).transpose(1, 2)
    made = Bases(
        down_key=basis.plain @ down[:, values:].T,
        down_value=down[:, :values].T.reshape(groups, dv, rank),
        down_bias=-down @ mean,
        rope_key=basis.rotated,
        latent_query=(basis.plain @ up[values:]).repeat_interleave(spec.groups, 0),
        rope_query=basis.rotated.repeat_interleave(spec.groups, 0),
        up_value=up_value.repeat_interleave(spec.groups, 0),
        up_bias=mean[:values].reshape(groups, dv),
    )
    return Bases(*(tensor.float().contiguous() for tensor in made))


def flat(x: Tensor) -> Tensor:
    """[B,G,T,d] -> [B T, G d]."""
    return x.transpose(1, 2).flatten(2).flatten(0, 1)


def flat_map(x: Tensor, columns: Tensor) -> Tensor:
    """[B,G,T,d], [G,d,n] -> [B T, n]."""
    return flat(x) @ columns.flatten(0, 1).to(x.device)
