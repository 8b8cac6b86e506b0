"""Latent attention at a share of the teacher's cache: our bases against a plain SVD of the weights with a fixed slice.

    python benchmarks/bench_mla.py --json docs/mla_figures.json

Both at the same cache, on the embedded model, with the same number of rotated dims. The rival keeps the rotation on the
first pairs of every head, averaged over kv heads, and compresses what remains with the values by an SVD of the weight
matrices (as MHA2MLA and X-EcoMLA do), with no data. Ours is `mla` after `prepare` on the model's own samples; `refined`
adds the gradient passes of the recipe `transmla`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, ClassVar

import torch
from bench_recipes import Bench, Figure
from rich.console import Console
from torch import Tensor

import linearize
from linearize.calibration.evaluate import mixers_of, site_errors
from linearize.mixers import register_mixer
from linearize.mixers.mla import MLA
from linearize.mixers.mla_basis import assemble, key_basis, pair_dims, weighted_pca
from linearize.recipe import LayerRule, Recipe


@register_mixer
class WeightSVD(MLA):
    """The rival, as a mixer of the same form."""

    name = "mla_weight_svd"
    weights: ClassVar[list[tuple[Tensor, Tensor]]] = []  # (W_k [G d, D], W_v [G dv, D]) of the sites in order

    def prepare(self, inputs: list[Tensor], target: Tensor) -> None:
        spec, (w_k, w_v) = self.spec, self.weights.pop(0)
        groups = spec.kv_heads
        average = torch.full((groups, groups), groups**-0.5).double()
        mixing = torch.linalg.qr(torch.cat([average[:, :1], torch.eye(groups).double()[:, 1:]], 1))[0].T
        pairs = len(pair_dims(spec))
        order = torch.arange(pairs * groups).reshape(pairs, groups).T.flatten()  # first component of every pair first
        basis = key_basis(spec, mixing.expand(pairs, groups, groups), order, self.rope_dims)
        plain = basis.plain.flatten(0, 1).T @ w_k.double()
        z = torch.cat([w_v.double(), plain])
        down, up = weighted_pca(z @ z.T, torch.eye(len(z)).double(), self.rank)
        self._set(assemble(spec, basis, down, up, torch.zeros(len(z)).double()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=float, nargs="+", default=[0.75, 0.5])
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(arguments.tokens)
    rows = {"source": bench.source_row()}
    for cache in arguments.cache:
        for label, mixer, passes in (("weight SVD", "mla_weight_svd", 0), ("ours", "mla", 0), ("refined", "mla", 4)):
            rows[f"{label}, cache {cache:.0%}"] = measured(bench, mixer, cache, passes)
    Console().print(table(rows).drawn())
    if arguments.json:
        arguments.json.write_text(json.dumps({"tokens": arguments.tokens, "rows": rows}, indent=1) + "\n")


def measured(bench: Bench, mixer: str, cache: float, passes: int) -> dict[str, Any]:
    layers = bench.model.model.layers
    WeightSVD.weights[:] = [(layer.self_attn.k_proj.weight, layer.self_attn.v_proj.weight) for layer in layers]
    base = Recipe.load("transmla")
    rule = LayerRule(mixer=mixer, options={"cache": cache})
    recipe = base.model_copy(update={"rules": (rule,), "fit": base.fit.model_copy(update={"passes": passes})})
    model = linearize.compile(bench.program, recipe, calibration=bench.samples)
    errors = site_errors(bench.teacher, mixers_of(model.source), bench.rows)
    return {**bench.quality(model), "mse": sum(errors.values()) / len(errors), "state_4k": model.state_bytes(1, 4096)}


def table(rows: dict[str, dict[str, Any]]) -> Figure:
    lines = [
        (
            name, f"{row['mse']:.4f}", f"{row['perplexity']:.2f}", f"{row['kl']:.3f}", f"{row['top1']:.1%}",
            f"{row['recall']:.1%}",
        )
        for name, row in rows.items()
    ]  # fmt: skip
    heads = ("model", "MSE", "perplexity", "KL", "top-1", "recall")
    return Figure("latent attention on the embedded model", heads, lines, words=("model",))


if __name__ == "__main__":
    main()
