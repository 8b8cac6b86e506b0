"""Fitting by output MSE on the teacher's own inputs, streamed from site to site."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from linearize.calibration.fit import _cosine, fit_mixer, output_error
from linearize.calibration.samples import REPEAT_EVERY, repeat_segments, sample_teacher
from linearize.calibration.teacher import TeacherStream
from linearize.errors import DataError
from linearize.mixers import build_mixer
from linearize.passes.rewrite import RaiseAttention
from linearize.pipeline import run_pipeline
from linearize.program import Program
from linearize.progress import Progress
from linearize.recipe import Fit
from linearize.report import SiteReport
from linearize.rewriting.walk import evaluate
from tests import zoo

QUIET = Progress(False)


def teacher(name: str = "llama") -> Program:
    return run_pipeline(zoo.captured(name), [RaiseAttention()])


def batches(count: int = 6) -> list[Tensor]:
    return [zoo.tokens(4, 24, seed=index) for index in range(count)]


@pytest.mark.parametrize("name", ["llama", "gemma3", "nano_gpt", "shared_block"])
def test_the_stream_gives_the_values_of_one_run_of_the_teacher(name: str) -> None:
    program, ids = teacher(name), batches(2)
    stream = TeacherStream(program, ids)
    nodes = program.nodes_by_name()
    for site in stream.walk(program.matched):
        wanted = [site.nodes.query, site.nodes.key, site.nodes.value, site.nodes.core]
        for index, batch in enumerate(ids):
            given = {node: value for node, value in zip(program.placeholders(), _inputs(program, batch), strict=True)}
            expected = evaluate(program.module, [nodes[name] for name in wanted], given)
            inputs, output = stream.site_values(site, (), index)
            for actual, value in zip([*inputs, output], expected, strict=True):
                torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-5)
    for index, batch in enumerate(ids):
        assert zoo.difference(stream.logits(index), zoo.source_logits(name, batch)) <= 1e-5


def _inputs(program: Program, ids: Tensor) -> list[Tensor]:
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    made = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "position_ids": positions}
    return [made[name] for name in program.input_names()]


def test_the_error_is_the_mean_square_over_the_variance() -> None:
    program = teacher()
    site, stream = program.matched[0], TeacherStream(program, batches(3))
    mixer = build_mixer("window", site.attention, {"window": 3})
    outputs = [stream.site_values(site, (), index) for index in range(3)]
    y = torch.cat([target for _, target in outputs]).double()
    predicted = torch.cat([mixer.run(inputs) for inputs, _ in outputs]).double()
    expected = ((predicted - y).square().mean() / y.var(correction=0)).item()
    assert output_error(mixer, stream, site) == pytest.approx(expected, rel=1e-6)
    exact = build_mixer("keep", site.attention, {})
    assert output_error(exact, stream, site) <= 1e-10


@pytest.mark.parametrize("name", ["lolcats", "lizard"])
def test_fitting_lowers_the_held_out_error(name: str) -> None:
    program = teacher()
    site = program.matched[0]
    train, held = TeacherStream(program, batches(8)), TeacherStream(program, [zoo.tokens(4, 24, seed=99)])
    mixer = build_mixer(name, site.attention, {"window": 4})
    row = SiteReport(site=0, module=site.module, mixer=name)
    fit_mixer(mixer, train, held, site, Fit(passes=4), row, QUIET)
    assert row.error_start is not None
    assert row.error_fitted is not None
    assert row.error_fitted < 0.8 * row.error_start
    assert row.error_fitted == pytest.approx(output_error(mixer, held, site), rel=1e-6)
    assert row.parameters == sum(parameter.numel() for parameter in mixer.parameters())


def test_a_descent_that_did_not_help_is_undone() -> None:
    program = teacher()
    site = program.matched[0]
    stream = TeacherStream(program, batches(2))
    kept, prepared = (build_mixer("lolcats", site.attention, {"window": 4}) for _ in range(2))
    rows = [SiteReport(site=0, module=site.module, mixer="lolcats") for _ in range(2)]
    fit_mixer(kept, stream, stream, site, Fit(learning_rate=30.0, passes=3), rows[0], QUIET)
    fit_mixer(prepared, stream, stream, site, Fit(passes=0), rows[1], QUIET)
    assert rows[0].error_fitted == rows[1].error_fitted
    for name, tensor in kept.state_dict().items():
        torch.testing.assert_close(tensor, prepared.state_dict()[name])


def test_a_preparation_that_did_not_help_keeps_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    program = teacher()
    site = program.matched[0]
    stream = TeacherStream(program, batches(2))
    mixer = build_mixer("lolcats", site.attention, {"window": 4})
    before = {name: tensor.clone() for name, tensor in mixer.state_dict().items()}
    monkeypatch.setattr(mixer, "prepare", lambda inputs, target: mixer.omega.fill_(40.0))
    row = SiteReport(site=0, module=site.module, mixer="lolcats")
    fit_mixer(mixer, stream, stream, site, Fit(passes=0), row, QUIET)
    assert row.error_fitted == row.error_start
    assert all(torch.equal(tensor, before[name]) for name, tensor in mixer.state_dict().items())


def test_without_passes_only_what_needs_no_gradients_is_found() -> None:
    program = teacher()
    site = program.matched[0]
    stream = TeacherStream(program, batches())
    fitted, prepared = (build_mixer("lolcats", site.attention, {"window": 4}) for _ in range(2))
    with torch.no_grad():
        prepared.prepare(*stream.site_values(site, prepared.needs, 0))
    row = SiteReport(site=0, module="", mixer="lolcats")
    fit_mixer(fitted, stream, stream, site, Fit(passes=0), row, QUIET)
    assert row.error_fitted < row.error_start
    for name, tensor in fitted.state_dict().items():
        torch.testing.assert_close(tensor, prepared.state_dict()[name])


def test_fitting_one_site_does_not_move_another_or_the_teacher() -> None:
    program = teacher()
    site = program.matched[1]
    before = {name: tensor.clone() for name, tensor in program.module.state_dict().items()}
    stream = TeacherStream(program, batches(2))
    for current in stream.walk(program.matched):
        row = SiteReport(site=current.index, module=current.module, mixer="lolcats")
        fit_mixer(build_mixer("lolcats", site.attention, {"window": 4}), stream, stream, current, Fit(), row, QUIET)
    assert all(torch.equal(tensor, before[name]) for name, tensor in program.module.state_dict().items())
    assert all(parameter.grad is None for parameter in program.module.parameters())


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda weight: weight.fill_(float("nan")), r"site 0 \(.*\): the teacher's own output is not finite"),
        (lambda weight: weight.zero_(), r"site 0 \(.*\): the teacher's output does not vary"),
    ],
)
def test_a_teacher_without_an_error_to_speak_of_is_told(break_it: object, message: str) -> None:
    import linearize

    model = zoo.BY_NAME["enable_gqa"].build()
    program = run_pipeline(linearize.capture(model), [RaiseAttention()])
    with torch.no_grad():
        break_it(model.get_parameter("blocks.0.attn.wv.weight"))  # type: ignore[operator]
    site, stream = program.matched[0], TeacherStream(program, batches(1))
    with pytest.raises(DataError, match=message):
        output_error(build_mixer("lolcats", site.attention, {"window": 4}), stream, site)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [_cosine(step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(0.2)
    assert max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.05, abs=0.01)
    assert all(a >= b for a, b in pairwise(rates[5:]))
    assert _cosine(0, 1) == 1.0


# ---- the teacher's own samples ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "nano_gpt", "alibi_sdpa"])
def test_samples_are_token_ids_of_the_asked_number(name: str) -> None:
    program = teacher(name)
    drawn = sample_teacher(program, tokens=100, length=10, seed=3, progress=QUIET)
    assert all(batch.shape[1] == 10 and batch.dtype == torch.int64 for batch in drawn)
    assert 100 <= sum(batch.numel() for batch in drawn) <= 120
    assert all(int(batch.min()) >= 0 and int(batch.max()) < zoo.VOCAB for batch in drawn)
    again, other = (sample_teacher(program, 100, 10, seed, QUIET) for seed in (3, 4))
    assert torch.equal(torch.cat(drawn), torch.cat(again))
    assert not torch.equal(torch.cat(drawn), torch.cat(other))
    if name == "llama":
        assert bool((torch.cat(drawn)[:, 0] == 1).all())  # bos_token_id


def test_samples_follow_the_teachers_distribution() -> None:
    """The second token's frequencies after one bos, against softmax of the source's logits."""
    program = teacher("llama")
    rows = torch.cat(sample_teacher(program, tokens=4000, length=2, seed=0, progress=QUIET))
    drawn = rows[torch.arange(len(rows)) % REPEAT_EVERY != REPEAT_EVERY - 1]
    expected = zoo.source_logits("llama", torch.tensor([[1]]))[0, 0].softmax(-1)
    found = torch.bincount(drawn[:, 1], minlength=zoo.VOCAB) / len(drawn)
    assert (found - expected).abs().sum() < 0.25


def test_every_fourth_sample_repeats_a_segment_of_itself_and_the_others_stay() -> None:
    rows = zoo.tokens(16, 48)
    repeated = repeat_segments(rows, torch.Generator().manual_seed(0))
    for index, (row, new) in enumerate(zip(rows, repeated, strict=True)):
        if index % REPEAT_EVERY != REPEAT_EVERY - 1:
            assert torch.equal(row, new)
            continue
        assert new[0] == row[0]
        periods = [size for size in range(4, 25) if torch.equal(new[1 + size :], new[1:-size])]
        assert periods
        segment = new[1 : 1 + periods[0]].tolist()
        assert any(row[start : start + len(segment)].tolist() == segment for start in range(48))
    assert not torch.equal(rows, repeated)


def test_samples_stop_at_the_learned_positions() -> None:
    for name in ("gpt2", "nano_gpt"):
        drawn = sample_teacher(teacher(name), tokens=600, length=512, seed=0, progress=QUIET)
        assert {batch.shape[1] for batch in drawn} == {64}


def test_a_model_whose_vocabulary_is_unknown_needs_data() -> None:
    with pytest.raises(DataError, match="pass calibration data"):
        sample_teacher(teacher("one_hot_tokens"), 100, 10, 0, QUIET)
