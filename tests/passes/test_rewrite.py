"""Raising and rewriting: exact where they say so, and every recovered feature matters."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import linearize
from linearize.capture.torch_export import capture_graph
from linearize.errors import RecipeError, VerificationError
from linearize.passes import CAPTURE_PASSES
from linearize.passes.lower import LOWER_PASSES
from linearize.passes.normalise import NORMALISE_PASSES
from linearize.passes.rewrite import InsertMixers, RaiseAttention
from linearize.pipeline import Keeps, Pass, Stage, run_pipeline
from linearize.plan import Plan, PlanEntry
from linearize.program import Program, op_counts
from linearize.spec import MaskSpec
from linearize.verify import check_exact
from tests import zoo


def logits(program: Program, ids: torch.Tensor) -> torch.Tensor:
    made = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "position_ids": torch.arange(ids.shape[1]).expand_as(ids),
    }
    with torch.no_grad():
        return program.module(*(made[name] for name in program.input_names()))


def raised(program: Program, **changes: object) -> Program:
    """The program raised with facts of every site's attention replaced."""
    sites = [replace(site, attention=replace(site.attention, **changes)) for site in program.matched]  # type: ignore[arg-type]
    return RaiseAttention().run(program.replace(sites=tuple(sites)))


@pytest.mark.parametrize(
    ("name", "ignored"),
    [
        ("gemma2", {"softcap": 0.0}),
        ("soft_capped", {"softcap": 0.0}),
        ("mistral", {"mask": MaskSpec("causal", padding=True)}),
        ("banded_window", {"mask": MaskSpec("causal")}),
        ("banded_window", {"mask": MaskSpec("sliding", 7)}),
        ("gemma3", {"mask": MaskSpec("causal", padding=True)}),
        ("granite", {"scale": 8**-0.5}),
        ("bool_mask", {"scale": 8**-0.5}),
        ("gpt_oss", {"sinks": False}),
        ("sink_logits", {"sinks": False}),
        ("bloom", {"alibi": ()}),
        ("bloom", {"alibi": (0.0625, 0.25, 0.015625, 0.00390625)}),
        ("falcon_alibi", {"alibi": ()}),
        ("alibi_sdpa", {"alibi": ()}),
        ("chunked", {"mask": MaskSpec("causal")}),
        ("chunked", {"mask": MaskSpec("chunked", 7)}),
    ],
)
def test_a_feature_that_were_ignored_would_show(name: str, ignored: dict) -> None:
    program, ids = zoo.captured(name), zoo.tokens(2, 21)
    expected = logits(program, ids)
    assert zoo.difference(logits(raised(program), ids), expected) <= 1e-5
    assert zoo.difference(logits(raised(program, **ignored), ids), expected) > 1e-3


def test_padding_that_were_ignored_would_show() -> None:
    program, ids = zoo.captured("llama"), zoo.tokens(2, 12)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    positions = torch.arange(12).expand_as(ids)
    deaf = [replace(s, attention=replace(s.attention, mask=MaskSpec("causal"))) for s in program.matched]
    with torch.no_grad():
        expected = program.module(ids, mask, positions)[mask.bool()]
        right = raised(program).module(ids, mask, positions)[mask.bool()]
        wrong = RaiseAttention().run(program.replace(sites=tuple(deaf))).module(ids, mask, positions)[mask.bool()]
    assert zoo.difference(right, expected) <= 1e-5
    assert zoo.difference(wrong, expected) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "nano_gpt", "gemma2"])
def test_every_exact_pass_keeps_the_logits(name: str) -> None:
    """The whole pipeline with numbers compared between one pass and the next."""
    program = zoo.captured(name)
    plan = zoo.compiled(name, "lolcats{window=4}").plan
    exact = run_pipeline(program, [*CAPTURE_PASSES, RaiseAttention()], verify="numerics")
    assert [type(site) for site in exact.sites] == [type(site) for site in program.sites]
    lossy = run_pipeline(exact, [InsertMixers(plan), *LOWER_PASSES])
    assert lossy.state_names


def test_passes_leave_the_program_that_they_were_given() -> None:
    program, ids = zoo.captured("llama"), zoo.tokens(2, 9)
    code, before = program.module.code, logits(program, ids)
    plan = zoo.compiled("llama", "lolcats{window=4}").plan
    run_pipeline(program, [*CAPTURE_PASSES, RaiseAttention(), InsertMixers(plan), *LOWER_PASSES])
    assert program.module.code == code
    assert torch.equal(logits(program, ids), before)
    assert not any("linearize_mixers" in name for name, _ in program.module.named_parameters())


def test_parameters_are_shared_from_stage_to_stage() -> None:
    source = dict(zoo.source("llama").named_parameters())
    student = zoo.compiled("llama", "lolcats{window=4}")
    ours = dict(student.graph_module.named_parameters())
    shared = set(source) & set(ours)
    assert set(source) - shared <= {"lm_head.weight"}
    assert all(ours[name] is source[name] for name in shared)


def test_normalising_twice_changes_nothing() -> None:
    for name in ("llama", "gpt2", "gptj"):
        once = run_pipeline(zoo.captured(name), NORMALISE_PASSES)
        twice = run_pipeline(once, NORMALISE_PASSES)
        assert op_counts(twice.graph) == op_counts(once.graph)
        assert torch.equal(logits(twice, zoo.tokens(2, 9)), logits(once, zoo.tokens(2, 9)))


def test_every_pass_says_what_it_is_and_the_history_keeps_its_text() -> None:
    program = zoo.compiled("llama", "lolcats{window=4}").program
    names = [record.name for record in program.history]
    assert names[0] == "capture"
    assert names[-1] == "inline_mixers"
    assert len(set(names)) == len(names)
    assert all(record.seconds >= 0 and record.text.startswith("def LlamaForCausalLM(") for record in program.history)
    raised_record = next(record for record in program.history if record.name == "raise_attention")
    assert raised_record.op_counts["linearize.attention"] == 2
    assert "aten.scaled_dot_product_attention" not in raised_record.op_counts
    for step in (*CAPTURE_PASSES, RaiseAttention(), InsertMixers(Plan()), *LOWER_PASSES):
        assert isinstance(step, Pass)
        assert isinstance(step.stage, Stage)
        assert isinstance(step.keeps, Keeps)


def test_new_nodes_carry_the_rule_that_made_them() -> None:
    program = zoo.compiled("llama", "lolcats{window=4}").source
    calls = [node for node in program.graph.nodes if node.op == "call_module"]
    assert [node.meta["rule"] for node in calls] == ["insert_mixers"] * 2
    assert all(node.meta["origin"] for node in calls)


def test_an_exact_pass_that_is_not_is_caught() -> None:
    program = zoo.captured("mistral")
    wrong = raised(program, mask=MaskSpec("causal", padding=True))
    with pytest.raises(VerificationError, match=r"pass broken says that it is exact, but logits moved by"):
        check_exact(program, wrong, "broken", length=21)


def test_a_pass_that_breaks_shapes_is_named() -> None:
    class Break:
        name, stage, keeps = "break_head", Stage.REWRITE, Keeps.EXACT

        def run(self, program: Program) -> Program:
            module = program.copy_graph()
            output = next(node for node in module.graph.nodes if node.op == "output")
            with module.graph.inserting_before(output):
                output.args = (module.graph.call_function(torch.ops.aten.sum.dim_IntList, (output.args[0], [2])),)
            module.recompile()
            return program.replace(module=module)

    with pytest.raises(VerificationError, match=r"after pass break_head: logits have shape \[2, 13\], not \[B, T, V\]"):
        run_pipeline(zoo.captured("nano_gpt"), [Break()])  # type: ignore[list-item]


def test_a_pass_that_fixes_the_length_is_named() -> None:
    """Asking for a size as a number makes it the one traced, in every shape: the rest would hold for 13 tokens only."""

    class Fix:
        name, stage, keeps = "fix_length", Stage.NORMALISE, Keeps.EXACT

        def run(self, program: Program) -> Program:
            int(program.placeholders()[0].meta["val"].shape[1])
            return program.replace(module=program.copy_graph())

    program = linearize.capture(zoo.source("nano_gpt"))
    with pytest.raises(VerificationError, match=r"after pass fix_length: the length is no longer dynamic, but \d+ as"):
        run_pipeline(program, [Fix()])  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("name", "feature"),
    [
        ("soft_capped", "the soft-cap of 3"),
        ("sink_logits", "the teacher's sink logits"),
        ("alibi_manual", r"the teacher's linear position bias \(ALiBi\)"),
        ("chunked", "the teacher's chunks of 6"),
    ],
)
@pytest.mark.parametrize("mixer", ["window", "lolcats", "lizard"])
def test_a_plan_entry_for_a_mixer_that_would_lose_a_feature_is_refused(name: str, feature: str, mixer: str) -> None:
    program = run_pipeline(zoo.captured(name), [RaiseAttention()])
    plan = Plan(entries=(PlanEntry(site=0, module="blocks.0.attn", mixer=mixer),))
    with pytest.raises(RecipeError, match=rf"site 0 \(blocks.0.attn\): {mixer} does not carry {feature}"):
        InsertMixers(plan).run(program)


def test_sliding_sinks_are_kept_and_say_why() -> None:
    entry = zoo.compiled("gpt_oss", "lolcats").plan.entries[0]
    assert (entry.mixer, entry.reason) == ("keep", "sliding window with sink logits")


@pytest.mark.parametrize("name", ["bloom", "xglm"])
def test_products_of_rank_3_are_lifted_exactly(name: str) -> None:
    text = zoo.captured(name).history[-1].text
    assert "bmm" not in text
    program = zoo.captured(name)
    assert all(program.node(site.nodes.key).meta["val"].ndim == 4 for site in program.matched)
    check_exact(capture_graph(zoo.source(name)), program, "normalise")


@pytest.mark.parametrize("name", ["bloom", "chunked", "sink_logits"])
def test_kept_positions_and_sinks_are_saved_and_loaded(name: str, tmp_path: Path) -> None:
    model, ids = zoo.compiled(name), zoo.tokens(2, 15)
    model.save_pretrained(tmp_path / "model")
    with torch.no_grad():
        assert torch.equal(linearize.load(tmp_path / "model")(ids).logits, model(ids).logits)
