"""How much the end loss minds an error at a site's output, to second order.

With p the teacher's distribution and J the derivative of the logits by a site's output y, an error e costs

    KL  ~  1/2 sum_t (J_t e)^T (diag p_t - p_t p_t^T) (J_t e)  =  1/2 E[ (g . e)^2 ],    g = sum_t d log p_t(x_t) / d y

with x_t drawn from p_t, independently at every position t (the Fisher information, sampled). One backward pass a
sample gives g for all positions and heads of the site, so any number of candidates cost no further run.

g . e is a sum over positions, and its square has a term for every pair of them. The pairs' terms are noise but for what
two errors do to the same later token, so they are left out: 1/2 sum_t E[(g_t . e_t)^2] differs from the loss by a few
per cent and needs tens of times fewer samples (docs/planning.md).

g_t . e_t is a sum over heads. Kept by head, a_hc of candidate c at head h, it says what heads that differ lose
together: 1/2 sum_t E[(sum_h a_{h,c(h)})^2], where errors of heads add up or cancel. What the file of scores keeps of
it are the lengths of the a_hc, and a sketch of them for their angles.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from linearize.calibration.teacher import TeacherStream
from linearize.program import Program
from linearize.rewriting.walk import attribute, cone, descendants, ordered
from linearize.spec import Site


def gradients(stream: TeacherStream, site: Site, batch: int, samples: int, seed: int) -> Tensor:
    """g [samples, B, H, T, dv] of one batch, each row with draws of its own."""
    program = stream.program
    nodes = program.nodes_by_name()
    core = nodes[site.nodes.core]
    inside = descendants(program.graph, [core])
    output: fx.Node = next(node for node in program.graph.nodes if node.op == "output").args[0]  # type: ignore[assignment]
    behind = ordered(cone([output]) & inside, program.graph)
    border = dict.fromkeys(arg for node in behind for arg in node.all_input_nodes if arg not in inside)
    outside = [arg for arg in border if arg.op != "get_attr"]
    values = dict(zip(outside, stream.values([arg.name for arg in outside], batch), strict=True))
    start = stream.values([core.name], batch)[0].detach().requires_grad_()
    with torch.enable_grad():
        logits = _run(program, behind, core, output, {**values, core: start})
        draws = drawn_likelihood(logits, samples, seed, batch)
    return torch.stack([torch.autograd.grad(total, start, retain_graph=True)[0] for total in draws])


def drawn_likelihood(logits: Tensor, samples: int, seed: int, batch: int) -> list[Tensor]:
    """sum_t log p_t(x_t) of each sample, x_t drawn from p_t; logits [B, T, V] with gradients."""
    logs = logits.float().log_softmax(-1)
    probabilities = logs.detach().exp().flatten(0, 1)
    found = []
    for sample in range(samples):
        generator = torch.Generator(device=logs.device).manual_seed((seed * 1009 + batch) * 1009 + sample)
        drawn = torch.multinomial(probabilities, 1, generator=generator).view(*logs.shape[:2], 1)
        found.append(logs.gather(-1, drawn).sum())
    return found


def _run(
    program: Program, behind: list[fx.Node], core: fx.Node, output: fx.Node, values: dict[fx.Node, Any]
) -> Tensor:
    """The logits, with gradients by the value of `core`."""
    for node in behind:
        if node is core:
            continue
        for arg in node.all_input_nodes:
            if arg.op == "get_attr" and arg not in values:
                values[arg] = attribute(program.module, str(arg.target)).detach()
        args, kwargs = fx.node.map_arg((node.args, dict(node.kwargs)), lambda arg: values[arg])
        called: Any = attribute(program.module, str(node.target)) if node.op == "call_module" else node.target
        values[node] = called(*args, **kwargs)
    return values[output]  # type: ignore[no-any-return]


def effects(gradient: Tensor, error: Tensor, kv_heads: int) -> Tensor:
    """g_t . e_t by kv head, [samples, B, G, T] in float64.

    gradient [samples, B, H, T, dv], error [B, H, T, dv].
    """
    wide = error.double()
    products = torch.stack([(one.double() * wide).sum(-1) for one in gradient])
    return products.unflatten(2, (kv_heads, -1)).sum(3)


def second_order(effect: Tensor) -> tuple[Tensor, Tensor]:
    """1/2 E[(g_t . e_t)^2] of `effects` [samples, B, G, T], summed over rows and positions: (of all heads together,
    [G] of each kv head alone)."""
    heads = effect.square().mean(0).sum((0, 2))
    return 0.5 * effect.sum(2).square().mean(0).sum(), 0.5 * heads


def sketch(effect: Tensor, width: int, seed: int) -> Tensor:
    """[G, width] of `effects` [samples, B, G, T]: inner products of its rows are, up to about 1 / sqrt(width) of the
    product of their lengths, those of all samples, rows and positions (their mean over samples).

    Every entry is a sum with random signs, the same for every candidate; sketches of batches add.
    """
    flat = effect.movedim(2, 0).flatten(1)
    signs = torch.randint(0, 2, flat.shape[1:], generator=torch.Generator().manual_seed(seed)).to(flat) * 2 - 1
    padded = torch.nn.functional.pad(flat * signs, (0, -flat.shape[1] % width))
    return padded.unflatten(1, (-1, width)).sum(1) / effect.shape[0] ** 0.5
