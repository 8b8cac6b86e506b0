"""Weights of low rank as choices of their own (SVD-LLM, `calibration.low_rank`), by block of the teacher's stream.

A block's products with weights keep all their numbers, or a share of `SHARES`, by the whitened SVD of what goes into
them on the rows that everything is scored on. Ranks change no state: they are chosen under a budget of weight bytes, by
the same knapsack as mixers, and take their part of a decoded token's time. The loss of a block at a share is the KL of
the model with its weights multiplied out, A B for W, the rest being the source; blocks add up.

One walk; of one block the Gram matrices are in memory. What was measured is kept, one file a block.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from linearize.calibration.keys import hash_of, model_key
from linearize.calibration.low_rank import choose_ranks, gram_of, product_weight, whitened_svd
from linearize.calibration.scores import cache_folder
from linearize.calibration.teacher import TeacherStream
from linearize.errors import ArtifactError, RecipeError
from linearize.files import write_atomically
from linearize.passes.rewrite.lower_rank import Product, products
from linearize.plan import LowRankEntry
from linearize.planner.counting import Call, Counting
from linearize.planner.solver import Option, solve
from linearize.planner.student import divergence
from linearize.program import Program
from linearize.progress import Progress
from linearize.recipe import LowRank
from linearize.rewriting.walk import attribute
from linearize.spec import Site

SHARES = (0.9, 0.8, 0.7, 0.6, 0.5, 0.35)
VERSION = 1


@dataclass(frozen=True)
class Ranks:
    """What the weights of one block become, with its loss in nats a token."""

    loss: float
    entries: tuple[LowRankEntry, ...] = ()


WHOLE = Ranks(0.0)


def rank_scores(
    teacher: Program, data: Callable[[], Sequence[Tensor]], data_key: str, progress: Progress
) -> dict[int, list[Ranks]]:
    """By site, of the block that starts with it: whole, and at every share that its weights shrink at.

    Raises:
        RecipeError: the model stays on disk, or has no weights that would shrink.
    """
    if teacher.weights is not None or teacher.valueless:
        raise RecipeError("weights of low rank are chosen for a model in memory only: leave the budget of weights out")
    wanted = {share: choose_ranks(teacher, LowRank(keep=share)) for share in SHARES}
    model = model_key(teacher)
    files = {
        site.index: cache_folder("planner") / f"{hash_of(model, data_key, f'ranks {site.index} {VERSION}')}.json"
        for site in teacher.matched
    }
    known = {site: made for site, file in files.items() if (made := _read(file)) is not None}
    if len(known) < len(files):
        missing = [site for site in teacher.matched if site.index not in known]
        known |= _measure(TeacherStream(teacher, list(data())), missing, wanted, files, progress)
    return {site: [WHOLE, *made] for site, made in known.items()}


def _measure(
    stream: TeacherStream, sites: Sequence[Site], wanted: Mapping[float, Sequence[LowRankEntry]],
    files: Mapping[int, Path], progress: Progress,
) -> dict[int, list[Ranks]]:  # fmt: skip
    found = products(stream.program.module)
    known: dict[int, list[Ranks]] = {}
    with torch.no_grad():
        for site in progress.track(stream.walk(tuple(sites)), "scoring weights", total=len(sites)):
            inside = stream.blocks.inside(stream.blocks.index(site))
            own = [product for product in found if product.node in inside]
            known[site.index] = _block(stream, own, wanted)
            _write(files[site.index], known[site.index])
    return known


def _block(
    stream: TeacherStream, own: Sequence[Product], wanted: Mapping[float, Sequence[LowRankEntry]]
) -> list[Ranks]:
    names = {product.parameter for product in own}
    ours = [tuple(entry for entry in entries if entry.weight in names) for entries in wanted.values()]
    grams = _grams(stream, own)
    largest = {entry.weight: entry for entries in reversed(ours) for entry in entries}  # shares fall
    factors = {
        product.parameter: whitened_svd(
            product_weight(stream.program, product), grams[product.parameter], largest[product.parameter].rank
        )
        for product in own if product.parameter in largest
    }  # fmt: skip
    return [Ranks(_loss(stream, thin_weights(stream.program, one, factors)), one) for one in dict.fromkeys(ours) if one]


def _grams(stream: TeacherStream, own: Sequence[Product]) -> dict[str, Tensor]:
    """By weight, X X^T of all that it is multiplied with."""
    nodes = list(dict.fromkeys(product.x for product in own))
    grams: dict[fx.Node, Tensor] = {}
    for batch in range(len(stream.batches)):
        for node, value in zip(nodes, stream.values([node.name for node in nodes], batch), strict=True):
            grams[node] = grams[node] + gram_of(value) if node in grams else gram_of(value)
    total: dict[str, Tensor] = {}
    for product in own:
        gram = grams[product.x]
        total[product.parameter] = total[product.parameter] + gram if product.parameter in total else gram
    return total


def thin_weights(
    program: Program, entries: Sequence[LowRankEntry], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> dict[fx.Node, Tensor]:
    """{node that reads a weight: A B in its place}, of factors A [out,r'], B [r',in] of at least the entries' ranks."""
    transposed = {product.parameter: product.transposed for product in products(program.module)}
    made = {}
    for entry in entries:
        second, first = factors[entry.weight]
        whole = second[:, : entry.rank] @ first[: entry.rank]
        weight = attribute(program.module, entry.weight)
        made[entry.weight] = (whole.T if transposed[entry.weight] else whole).to(weight.dtype)
    return {
        node: made[str(node.target)] for node in program.graph.nodes if node.op == "get_attr" and node.target in made
    }


def _loss(stream: TeacherStream, weights: Mapping[fx.Node, Tensor]) -> float:
    replaced = {node.name: weight for node, weight in weights.items()}
    batches = range(len(stream.batches))
    total = sum(divergence(stream.logits(batch), stream.logits(batch, replaced)) for batch in batches)
    return max(total / sum(batch.numel() for batch in stream.batches), 0.0)


# ---- choosing --------------------------------------------------------------------------------------------------------


def weight_bytes(program: Program, entries: Sequence[LowRankEntry]) -> int:
    """How many bytes fewer than the source's the weights take (as a number below 0)."""
    total = 0
    for entry in entries:
        weight = attribute(program.module, entry.weight)
        out, width = weight.shape
        total += (entry.rank * (out + width) - out * width) * weight.element_size()
    return total


def choose(program: Program, table: Mapping[int, Sequence[Ranks]], limit: float, source: int) -> list[Ranks]:
    """Of every block, so that all weights take at most `limit` bytes and least is lost; `source` is what they take now.

    Raises:
        RecipeError: not even the lowest ranks fit.
    """
    least = {site: min(weight_bytes(program, one.entries) for one in row) for site, row in table.items()}
    items = [
        [Option(one.loss, weight_bytes(program, one.entries) - least[site], one) for one in row]
        for site, row in table.items()
    ]
    places = solve(items, limit - source - sum(least.values()))
    if places is None:
        lowest = source + sum(least.values())
        raise RecipeError(f"no ranks fit {limit:,.0f} bytes of weights: the least are {lowest:,}; raise --weights")
    return [item[at].choice for item, at in zip(items, places, strict=True)]


def saved_calls(program: Program, entries: Sequence[LowRankEntry]) -> tuple[list[Call], list[Call]]:
    """(operators of one decoded token that go, those that come in their place)."""
    gone, come = list[Call](), list[Call]()
    for entry in entries:
        out, width = attribute(program.module, entry.weight).shape
        gone += _product_calls(out, width)
        come += [*_product_calls(entry.rank, width), *_product_calls(out, entry.rank)]
    return gone, come


def _product_calls(out: int, width: int) -> list[Call]:
    inputs, weight = torch.empty(1, 1, width, device="meta"), torch.empty(out, width, device="meta")
    with torch.no_grad(), Counting() as counting:
        torch.nn.functional.linear(inputs, weight)
    return counting.calls


# ---- what is remembered ----------------------------------------------------------------------------------------------


def _read(file: Path) -> list[Ranks] | None:
    """None where there is no such file, or none that can be used."""
    try:
        return [
            Ranks(float(loss), tuple(LowRankEntry.model_validate(entry) for entry in entries))
            for loss, entries in json.loads(file.read_text())
        ]
    except (OSError, ValueError, TypeError):
        return None


def _write(file: Path, made: Sequence[Ranks]) -> None:
    """A cache that cannot be written costs time, nothing else."""
    with contextlib.suppress(OSError, ArtifactError):
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [[one.loss, [entry.model_dump() for entry in one.entries]] for one in made]
        write_atomically(file, json.dumps(rows).encode())
