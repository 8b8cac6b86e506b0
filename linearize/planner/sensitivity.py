"""How much the end loss minds an error at a site's output, to second order.

With p the teacher's distribution and J the derivative of the logits by a site's output y, an error e costs

    KL  ~  1/2 sum_t (J_t e)^T (diag p_t - p_t p_t^T) (J_t e)  =  1/2 E[ (g . e)^2 ],    g = sum_t d log p_t(x_t) / d y

with x_t drawn from p_t, independently at every position t (the Fisher information, sampled). One backward pass a
sample gives g for all positions and heads of the site, so any number of candidates cost no further run. The same sum
over the positions of one head alone says how much of a loss is that head's.
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


def quadratic(gradient: Tensor, error: Tensor, kv_heads: int) -> tuple[Tensor, Tensor]:
    """1/2 E[(g . e)^2], summed over rows: (of all heads together, [G] of each kv head alone), in float64.

    gradient [samples, B, H, T, dv], error [B, H, T, dv].
    """
    by_head = (gradient.double() * error.double()).sum((-1, -2)).unflatten(-1, (kv_heads, -1)).sum(-1)
    return 0.5 * by_head.sum(-1).square().mean(0).sum(), 0.5 * by_head.square().mean(0).sum(0)
