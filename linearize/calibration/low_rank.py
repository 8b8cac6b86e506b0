"""Weights of low rank by truncation-aware whitening (SVD-LLM, Wang et al. 2024, arXiv 2403.07378).

    S S^T = X X^T      Cholesky, X [in,N] the weight's inputs on calibration data
    W S = U Sigma V^T
    A = U_r Sigma_r^(1/2),  B = Sigma_r^(1/2) V_r^T S^-1            W ~ A B,  A [out,r], B [r,in]

S^-1 X is white, so leaving out the singular value sigma_i costs exactly sigma_i: |W X - A B X|^2 = sum_{i>r} sigma_i^2,
which no other choice of rank r undercuts (theorem 3.2). Without whitening it is the plain SVD, which knows nothing of
the inputs. This is the paper's SVD-LLM(W): its second step, new A from the activations of the compressed layers, is not
done. Everything here is float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from linearize.errors import RecipeError
from linearize.passes.rewrite.lower_rank import Product, every_product, products
from linearize.plan import LowRankEntry
from linearize.program import MASK, POSITIONS, TOKENS, Program
from linearize.recipe import LowRank
from linearize.rewriting.walk import attribute

DAMPING = 1e-9  # of the mean square of an input: fewer tokens than inputs leave no Cholesky factor
ROLES = {"attention": ("query", "key", "value", "output"), "key_value": ("key", "value")}


def choose_ranks(program: Program, table: LowRank) -> tuple[LowRankEntry, ...]:
    """The rank of each weight that `table` asks for: r (out + in) is at most the share `keep` of out x in numbers.

    Raises:
        RecipeError: there is no such weight.
    """
    entries = []
    for name in _wanted(program, table.of):
        out, width = attribute(program.module, name).shape
        rank = max(1, int(table.keep * out * width / (out + width)))
        if rank * (out + width) < out * width:
            entries.append(LowRankEntry(weight=name, rank=rank))
    if not entries:
        raise RecipeError(f"low_rank: {program.model_name} has no weights of the kind {table.of!r} that would shrink")
    return tuple(entries)


def _wanted(program: Program, of: str) -> list[str]:
    found = list(dict.fromkeys(product.parameter for product in products(program.module)))
    if of in ROLES:
        known = {p.parameter for site in program.matched for p in site.projected if p.role in ROLES[of]}
        return [name for name in found if name in known]
    every = every_product(program.graph)
    head = every[-1].parameter if every else None  # the last one makes the logits
    return [name for name in found if name != head]


def whitened_factors(
    program: Program, entries: Sequence[LowRankEntry], batches: list[Tensor]
) -> dict[str, tuple[Tensor, Tensor]]:
    """{weight: (A, B)} of a captured or raised program, over batches int64 [B, T].

    Raises:
        RecipeError: a weight is not there, or a rank is more than it has.
    """
    ranks = {entry.weight: entry.rank for entry in entries}
    found: dict[str, list[Product]] = {}
    for product in products(program.module):
        found.setdefault(product.parameter, []).append(product)
    missing = sorted(set(ranks) - set(found))
    if missing:
        raise RecipeError(f"low_rank: {missing[0]} is no weight of a product in {program.model_name}")
    grams = input_grams(program, {p.x for name in ranks for p in found[name]}, batches)
    made = {}
    for name, rank in ranks.items():
        weight = product_weight(program, found[name][0])
        if rank > min(weight.shape):
            raise RecipeError(f"low_rank: {name} is {list(weight.shape)} and has no rank {rank}")
        gram = torch.stack([grams[product.x] for product in found[name]]).sum(0)
        made[name] = whitened_svd(weight, gram, rank)
    return made


def product_weight(program: Program, product: Product) -> Tensor:
    """W [out,in] of a product, in float64."""
    weight: Tensor = attribute(program.module, product.parameter).detach().double()
    return weight.T if product.transposed else weight


def gram_of(inputs: Tensor) -> Tensor:
    """X X^T [in,in] of a product's inputs [..., in], in float64."""
    rows = inputs.flatten(0, -2).double()
    return rows.T @ rows


def whitened_svd(weight: Tensor, gram: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(A [out,r], B [r,in]) of W [out,in] with X X^T = gram [in,in]."""
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    root = torch.linalg.cholesky(gram + eye * (DAMPING * gram.diagonal().mean()).clamp_min(1e-30))
    u, sigma, vt = torch.linalg.svd(weight.to(gram.dtype) @ root, full_matrices=False)
    half = sigma[:rank].sqrt()
    back = torch.linalg.solve_triangular(root, vt[:rank], upper=False, left=False)
    return u[:, :rank] * half, half[:, None] * back


def input_grams(program: Program, wanted: set[fx.Node], batches: list[Tensor]) -> dict[fx.Node, Tensor]:
    """X X^T [in,in] of each wanted node's values over all tokens; activations live only as long as they are read."""
    grams: dict[fx.Node, Tensor] = {}
    runner = _Grams(program, wanted, grams)
    with torch.no_grad():
        for ids in batches:
            runner.run(*runner.inputs(ids.to(program.device)))
    return grams


class _Grams(fx.Interpreter):
    def __init__(self, program: Program, wanted: set[fx.Node], grams: dict[fx.Node, Tensor]) -> None:
        super().__init__(program.module, garbage_collect_values=True)
        self.program, self.wanted, self.grams = program, wanted, grams

    def inputs(self, ids: Tensor) -> list[Tensor]:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids).contiguous()
        made = {TOKENS: ids, MASK: torch.ones_like(ids), POSITIONS: positions}
        return [made[str(node.target)] for node in self.program.placeholders()]

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n in self.wanted:
            gram = gram_of(value)
            self.grams[n] = self.grams[n] + gram if n in self.grams else gram
        return value
