"""Scores of sites: the published similarity, errors and losses of candidates, cached, and the rules that use them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

import linearize
from linearize.api import plan_sites
from linearize.calibration import scores as scores_module
from linearize.calibration.fit import output_error
from linearize.calibration.keys import tokens_key
from linearize.calibration.scores import site_scores
from linearize.calibration.teacher import TeacherStream
from linearize.errors import RecipeError
from linearize.mixers import build_mixer
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.program import Program
from linearize.progress import Progress
from linearize.recipe import LayerRule, Recipe, Score
from tests import zoo

SIMILARITY = Score("similarity")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "scores"


def teacher(name: str) -> Program:
    return run_pipeline(zoo.captured(name), [RaiseAttention()])


def measured(program: Program, batches: list[Tensor], *wanted: Score) -> dict[str, dict[int, float]]:
    return site_scores(program, lambda: batches, tokens_key(batches), wanted, Progress(False))


def hooked_similarity(model: nn.Module, layers: str, attention: str, batches: list[Tensor]) -> list[float]:
    """cos(x, x + Attn(norm x)) by hooks on the source: x goes into the layer, Attn comes out of `attention`."""
    seen: dict[str, list[Tensor]] = {}
    hooks = []
    for index, layer in enumerate(model.get_submodule(layers).children()):
        keep_x = _keeper(seen, f"x{index}", lambda args, output: args[0])
        keep_a = _keeper(seen, f"a{index}", lambda args, output: output[0] if isinstance(output, tuple) else output)
        hooks += [layer.register_forward_hook(keep_x), layer.get_submodule(attention).register_forward_hook(keep_a)]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    count = len(seen) // 2
    pairs = [(torch.cat(seen[f"x{i}"]), torch.cat(seen[f"a{i}"])) for i in range(count)]
    return [cosine_similarity(x, x + a, dim=-1).mean().item() for x, a in pairs]


def _keeper(seen: dict[str, list[Tensor]], name: str, pick: Callable) -> Callable:
    return lambda module, args, output: seen.setdefault(name, []).append(pick(args, output).detach())


@pytest.mark.parametrize(
    ("name", "layers", "attention"),
    [
        ("llama", "model.layers", "self_attn"),
        ("gpt2", "transformer.h", "attn"),
        ("gemma2", "model.layers", "post_attention_layernorm"),  # a norm stands before the sum
        ("gptj", "transformer.h", "attn"),  # x + attention + MLP in one
    ],
)
def test_similarity_is_that_of_a_few_lines_with_hooks(name: str, layers: str, attention: str) -> None:
    batches = [zoo.tokens(2, 12), zoo.tokens(2, 12, seed=1)]
    expected = hooked_similarity(zoo.source(name), layers, attention, batches)
    found = measured(teacher(name), batches, SIMILARITY)["similarity"]
    assert list(found) == list(range(len(expected)))
    torch.testing.assert_close(torch.tensor(list(found.values())), torch.tensor(expected), rtol=1e-5, atol=1e-5)
    assert sorted(found, key=lambda i: -found[i]) == sorted(range(len(expected)), key=lambda i: -expected[i])


def test_llm_drop_deletes_the_most_similar_half() -> None:
    batches = [zoo.tokens(2, 12)]
    similarity = hooked_similarity(zoo.source("llama"), "model.layers", "self_attn", batches)
    compiled = zoo.compile_again("llama", "llm-drop", calibration=iter(batches))
    most = max(range(len(similarity)), key=lambda i: similarity[i])
    assert [entry.mixer for entry in compiled.plan.entries] == ["drop" if i == most else "keep" for i in range(2)]
    assert compiled.plan.entries[most].reason == f"rule most_similar: similarity {similarity[most]:.4g}"
    assert {spec.name.split("_")[1] for spec in compiled.state_specs if "layers" in spec.name} == {str(1 - most)}


def test_error_is_that_of_the_prepared_candidate() -> None:
    program, batches = teacher("llama"), [zoo.tokens(2, 24)]
    score = Score("error", "lightning", (("window", 4),))
    assert score.name == "error of lightning{window=4}"
    found = measured(program, batches, score)[score.name]
    site, stream = program.matched[0], TeacherStream(program, batches)
    mixer = build_mixer("lightning", site.attention, {"window": 4})
    with torch.no_grad():
        mixer.prepare(*stream.site_values(site, mixer.needs, 0))
    assert found[0] == pytest.approx(output_error(mixer, stream, site))
    assert 0 < found[0] < 1


def test_loss_is_that_of_the_model_with_the_one_site_replaced() -> None:
    program, ids = teacher("llama"), zoo.tokens(2, 24)
    score = Score("loss", "window", (("window", 4),))
    found = measured(program, [ids], score)[score.name]
    for replaced in (0, 1):
        entries = tuple(
            PlanEntry(site=site.index, module=site.module, mixer="window", options={"window": 4})
            if site.index == replaced
            else PlanEntry(site=site.index, module=site.module, mixer="keep")
            for site in program.matched
        )
        student = zoo.compile_again("llama", "none", plan=Plan(entries=entries), tokens=0)
        with torch.no_grad():
            q = student(ids).logits.log_softmax(-1)
            p = zoo.source_logits("llama", ids).log_softmax(-1)
        assert found[replaced] == pytest.approx((p.exp() * (p - q)).sum(-1).mean().item(), rel=1e-3)


def test_scores_are_measured_once_and_again_for_another_model_or_data(
    own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, batches = teacher("llama"), [zoo.tokens(2, 12)]
    measure, calls = scores_module._measure, []
    monkeypatch.setattr(scores_module, "_measure", lambda *args: calls.append(args) or measure(*args))
    first = measured(program, batches, SIMILARITY)
    assert measured(program, batches, SIMILARITY) == first
    assert (len(calls), len(list(own_cache.iterdir()))) == (1, 1)
    measured(program, [zoo.tokens(2, 12, seed=1)], SIMILARITY)
    parameter = next(program.module.parameters())
    with torch.no_grad():
        parameter[0, 0] += 0.5
        try:
            measured(program, batches, SIMILARITY)
        finally:
            parameter[0, 0] -= 0.5
    assert len(calls) == 3
    for file in own_cache.iterdir():
        file.write_text("{")
    assert measured(program, batches, SIMILARITY) == first


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LINEARIZE_CACHE", str(tmp_path / "file"))
    assert len(measured(teacher("llama"), [zoo.tokens(2, 12)], SIMILARITY)["similarity"]) == 2


# ---- rules -----------------------------------------------------------------------------------------------------------

VALUES = {"similarity": {0: 0.9, 1: 0.5, 2: 0.7, 3: 0.8}}


@pytest.mark.parametrize(
    ("layers", "share", "chosen"),
    [
        ("most_similar", 0.5, (0, 3)),
        ("least_similar", 0.5, (1, 2)),
        ("most_similar", 0.01, (0,)),
        ("least_similar", 0.7, (1, 2, 3)),
        ("most_similar", 1.0, (0, 1, 2, 3)),
    ],
)
def test_a_ranked_rule_takes_its_share(layers: str, share: float, chosen: tuple[int, ...]) -> None:
    rule = LayerRule.model_validate({"mixer": "drop", "layers": layers, "share": share})
    assert rule.resolved(VALUES).indices == chosen


def test_errors_and_losses_are_of_the_rules_mixer_or_of_another() -> None:
    rule = LayerRule(mixer="lolcats", layers="smallest_error", options={"window": 8, "sinks": 1})
    assert rule.score == Score("error", "lolcats", (("sinks", 1), ("window", 8)))
    kept = LayerRule(mixer="keep", layers="most_sensitive", of="drop", share=0.25)
    assert kept.score == Score("loss", "drop")
    assert kept.resolved({"loss of drop": {0: 1.0, 1: 9.0, 2: 2.0, 3: 0.1}}).indices == (1,)


def test_a_recipe_may_keep_the_sites_whose_loss_rises_most(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(
        'name = "mine"\n[[rules]]\nmixer = "drop"\n[[rules]]\nmixer = "keep"\nlayers = "most_sensitive"\nof = "drop"\n'
    )
    recipe, program = Recipe.load(path), teacher("llama")
    plan = plan_sites(program, recipe, [zoo.tokens(2, 12)])
    loss = measured(program, [zoo.tokens(2, 12)], Score("loss", "drop"))["loss of drop"]
    kept = max(loss, key=lambda site: loss[site])
    assert [entry.mixer for entry in plan.entries] == ["keep" if site == kept else "drop" for site in (0, 1)]


def test_planning_without_the_score_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"'most_similar' needs the sites' similarity, which was not measured"):
        Recipe.load("llm-drop").plan(zoo.captured("llama").matched)


def test_a_model_without_weights_cannot_be_scored() -> None:
    with torch.device("meta"):
        model = type(zoo.source("llama"))(zoo.source("llama").config).eval()
    with pytest.raises(RecipeError, match="similarity cannot be measured: the model has no weights"):
        linearize.inspect(model, "llm-drop")


def test_an_unknown_mixer_to_rank_by_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text('name = "x"\n[[rules]]\nmixer = "keep"\nlayers = "largest_error"\nof = "mamba"\n')
    with pytest.raises(RecipeError, match="no mixer named 'mamba'"):
        Recipe.load(path)
