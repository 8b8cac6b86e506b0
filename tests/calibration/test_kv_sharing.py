"""KVSharer: the search on examples worked by hand, and what sharing does to the compiled model."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

import linearize
from linearize.calibration import kv_sharing
from linearize.calibration.kv_sharing import cache_distances, choose_sharing, final_hidden, ranked, rerouted, similarity
from linearize.calibration.teacher import TeacherStream
from linearize.errors import RecipeError
from linearize.mixers.share import sharing_problem
from linearize.passes.rewrite import RaiseAttention, ShareKeys
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.program import Program
from linearize.progress import Progress
from tests import zoo

SHARING = {0: ("keep", {}), 1: ("share", {"of": 0})}


def raised(family: str = "llama") -> Program:
    return run_pipeline(zoo.captured(family), [RaiseAttention()])


def plan_of(program: Program, entries: dict[int, tuple[str, dict]]) -> Plan:
    return Plan(
        entries=tuple(
            PlanEntry(site=site.index, module=site.module, mixer=entries[site.index][0], options=entries[site.index][1])
            for site in program.matched
        )
    )


def test_the_most_distant_pairs_come_first_and_the_later_layer_reads_the_earlier() -> None:
    assert ranked({(1, 0): 2.0, (2, 0): 5.0, (2, 1): 1.0}) == [(2, 0), (1, 0), (2, 1)]


def test_who_read_a_layer_that_now_reads_another_goes_with_it() -> None:
    assert rerouted({}, 3, 1) == {3: 1}
    assert rerouted({3: 2}, 2, 0) == {3: 0, 2: 0}  # 3 read 2, which has no cache of its own any longer
    assert rerouted({1: 0}, 3, 1) == {1: 0, 3: 0}  # 1 has none to be read


def test_distances_are_means_over_heads_and_positions_of_the_average_caches() -> None:
    program = raised()
    batches = [zoo.tokens(2, 9), zoo.tokens(3, 9)]
    found = cache_distances(TeacherStream(program, batches), [0, 1])
    stream = TeacherStream(program, batches)
    expected = 0.0
    for part in ("key", "value"):
        rows = [
            torch.cat([stream.values([getattr(site.nodes, part)], batch)[0] for batch in (0, 1)])
            for site in program.matched
        ]
        expected += (rows[1].mean(0) - rows[0].mean(0)).square().sum(-1).sqrt().mean().item() / 2
    assert found == {(1, 0): pytest.approx(expected, rel=1e-5)}


def test_the_search_takes_pairs_in_order_while_the_hidden_states_stay_close(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four layers, half of them to share. (3, 0) moves the model too far, (3, 2) and (2, 1) do not; then 3 reads 1."""
    program, tried = raised(), []
    site = program.matched[0]
    four = program.replace(sites=tuple(dataclasses.replace(site, index=index) for index in range(4)))
    order = {(3, 0): 9.0, (3, 2): 8.0, (3, 1): 7.0, (2, 1): 6.0, (1, 0): 5.0}

    class Trial:
        def __init__(self, sources: dict[int, int]) -> None:
            self.sources = sources

        def run(self, _: Program) -> dict[int, int]:
            tried.append(self.sources)
            return self.sources

    monkeypatch.setattr(kv_sharing, "cache_distances", lambda *_: order)
    monkeypatch.setattr(kv_sharing, "ShareKeys", Trial)
    monkeypatch.setattr(kv_sharing, "final_hidden", lambda of, _: of)
    monkeypatch.setattr(kv_sharing, "similarity", lambda _, sources: 0.4 if sources.get(3) == 0 else 0.8)
    found = choose_sharing(four, [], [0, 1, 2, 3], 0.5, 0.5, Progress(False))
    assert {site: source.of for site, source in found.items()} == {3: 1, 2: 1}
    assert tried == [{3: 0}, {3: 2}, {3: 1, 2: 1}]
    assert "cosine of 0.800" in found[3].reason


def test_similarity_is_the_mean_cosine_of_rows() -> None:
    one, other = torch.tensor([[[3.0, 4.0]], [[1.0, 0.0]]]), torch.tensor([[[3.0, 4.0]], [[0.0, 2.0]]])
    assert similarity([one], [other]) == pytest.approx(0.5)


def test_the_hidden_states_compared_are_those_before_the_output_projection() -> None:
    program, ids = raised(), zoo.tokens(2, 7)
    (hidden,) = final_hidden(program, [ids])
    head = program.module.get_parameter("lm_head.weight")
    expected = TeacherStream(program, [ids]).logits(0)
    torch.testing.assert_close(hidden @ head.T, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_sharing_model_equals_the_source_with_the_other_layers_keys_in_pieces_too(family: str) -> None:
    program, ids = raised(family), zoo.tokens(2, 12)
    sites = [site.index for site in program.matched]
    entries = {index: SHARING.get(place, ("keep", {})) for place, index in enumerate(sites)}
    entries[sites[1]] = ("share", {"of": sites[0]})
    plan = plan_of(program, entries)
    compiled = linearize.compile(zoo.captured(family), plan=plan, tokens=0, progress=False)
    shared = ShareKeys({sites[1]: sites[0]}).run(program)
    with torch.no_grad():
        expected = TeacherStream(shared, [ids]).logits(0)
        whole = compiled(ids).logits
        first, state = compiled.step(ids[:, :5])
        second, _ = compiled.step(ids[:, 5:], state)
        source = TeacherStream(program, [ids]).logits(0)
    torch.testing.assert_close(whole, expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat([first, second], 1), expected, rtol=0, atol=1e-4)
    assert (expected - source).abs().max() > 1e-3


def test_a_sharing_layer_costs_one_byte_a_token_and_its_projections_are_not_computed(tmp_path: Path) -> None:
    program = raised()
    spec = program.matched[0].attention
    cache = spec.kv_heads * (spec.head_dim + spec.value_dim) * 4 + 1
    compiled = linearize.compile(zoo.captured("llama"), plan=plan_of(program, SHARING), tokens=0, progress=False)
    fixed = compiled.state_bytes(1, 0)
    assert compiled.state_bytes(1, 100) - fixed == 100 * (cache + 1)
    read = {str(node.target) for node in compiled.program.graph.nodes if node.op == "get_attr"}
    assert "model.layers.1.self_attn.q_proj.weight" in read
    assert not any("layers.1.self_attn.k_proj" in name or "layers.1.self_attn.v_proj" in name for name in read)
    compiled.save_pretrained(tmp_path / "saved")
    ids = zoo.tokens(2, 9)
    assert torch.equal(linearize.load(tmp_path / "saved")(ids).logits, compiled(ids).logits)


@pytest.mark.parametrize(
    ("entries", "reason"),
    [
        ({0: ("window", {"window": 4}), 1: ("share", {"of": 0})}, "becomes window and has none"),
        ({0: ("keep", {}), 1: ("share", {"of": 1})}, "a site before it, and 1 is none"),
        ({0: ("share", {"of": 0}), 1: ("keep", {})}, "a site before it, and 0 is none"),
        ({0: ("keep", {}), 1: ("share", {"of": -2})}, "of must be the index of a site"),
        (
            {0: ("keep", {}), 1: ("mixture", {"parts": [{"mixer": "share", "kv_heads": [0, 1]}]})},
            "share is for a whole site",
        ),
    ],
)
def test_what_cannot_be_shared_is_refused_by_name(entries: dict, reason: str) -> None:
    with pytest.raises(RecipeError, match=reason):
        linearize.compile(zoo.captured("llama"), plan=plan_of(raised(), entries), tokens=0, progress=False)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"kv_heads": 1}, "kv_heads is 1"), ({"dtype": "bfloat16"}, "dtype is bfloat16"), ({"rope": None}, "rotated as")],
)
def test_caches_of_another_kind_are_refused(changes: dict, reason: str) -> None:
    site = raised().matched[0]
    other = dataclasses.replace(site, attention=dataclasses.replace(site.attention, **changes))
    assert reason in (sharing_problem(site, other, "keep") or "")
    assert "not matched" in (sharing_problem(site, None, "keep") or "")
    assert sharing_problem(site, site, "keep") is None


def test_without_weights_the_recipe_says_that_it_searches_on_data() -> None:
    with torch.device("meta"):
        model = type(zoo.source("llama"))(zoo.source("llama").config).eval()
    with pytest.raises(RecipeError, match="searches on data"):
        linearize.inspect(model, "kvsharer")
