"""Models with a part that cannot be traced: it stands opaque in the graph, and everything around it works."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import linearize
from linearize.capture.leaf_shapes import learn_shapes
from linearize.capture.recording import recorded
from linearize.errors import ArtifactError, CaptureError, ExportError, RewriteError
from linearize.program import LEAF, Program, program_text
from linearize.runtime.model import LinearizedModel
from linearize.verify import check_shapes
from tests import zoo
from tests.capture import untraceable as parts
from tests.capture.untraceable import With, with_extra
from tests.plain_models import FusedSDPA, LearnedPositions

# a part, how it is called, whether it mixes tokens
OPAQUE: dict[str, tuple[Any, Any, bool]] = {
    "experts": (parts.Experts, None, False),
    "recurrence": (parts.Recurrence, None, True),
    "chunked scan": (parts.ChunkedScan, None, True),
    "numpy": (parts.Numpy, None, False),
    "dynamic angles": (parts.DynamicAngles, parts.add_angles, False),
    "many shapes": (parts.ManyShapes, parts.use_many, False),
}


@functools.cache
def opaque(name: str) -> tuple[nn.Module, Program]:
    """One of OPAQUE in a model, and its capture."""
    model = with_extra(*OPAQUE[name][:2])
    return model, linearize.capture(model)


@functools.cache
def compiled_experts() -> LinearizedModel:
    return linearize.compile(opaque("experts")[1], "none", progress=False)


def leaf_notes(program: Program) -> dict[str, dict[str, Any]]:
    return {str(node.target): node.meta[LEAF] for node in program.graph.nodes if LEAF in node.meta}


@pytest.mark.parametrize("name", OPAQUE)
def test_an_untraceable_module_becomes_a_call_of_itself(name: str) -> None:
    model, program = opaque(name)
    assert program.leaves == ("extra.0",)
    assert leaf_notes(program)["extra.0"]["mixes_tokens"] is OPAQUE[name][2]
    assert program.captured_by == "torch.export with 1 opaque leaf (extra.0)"
    assert any(note.startswith("extra.0 stands opaque in the graph") for note in program.notes)
    assert len(program.matched) == 1
    assert "extra.0(" in program_text(program)
    for batch, length in ((1, 1), (3, 20), (2, 45)):
        ids = zoo.tokens(batch, length)
        with torch.no_grad():
            assert zoo.difference(program.module(ids), model(ids)) <= 1e-5, (batch, length)
    check_shapes(program, "capture", batch=3, length=19)


@pytest.mark.parametrize("name", ["experts", "recurrence", "many shapes"])
def test_gradients_through_a_leaf_are_the_models(name: str) -> None:
    model, program = opaque(name)
    ids = zoo.tokens(2, 17)
    parameters = dict(model.named_parameters())
    assert dict(program.module.named_parameters()).keys() == parameters.keys()
    assert all(parameters[key] is value for key, value in program.module.named_parameters())
    weight = torch.randn(2, 17, zoo.VOCAB, generator=torch.Generator().manual_seed(0))
    found = torch.autograd.grad((program.module(ids) * weight).sum(), list(parameters.values()))
    expected = torch.autograd.grad((model(ids) * weight).sum(), list(parameters.values()))
    for key, one, other in zip(parameters, found, expected, strict=True):
        assert zoo.difference(one, other) <= 1e-5, key


def test_a_leaf_that_changes_with_far_positions_says_so() -> None:
    found = leaf_notes(opaque("dynamic angles")[1])["extra.0"]
    assert found["far_positions"]


def test_all_layers_alike_become_leaves_at_once() -> None:
    class Many(LearnedPositions):
        def __init__(self) -> None:
            super().__init__(FusedSDPA)
            self.layers = nn.ModuleList(parts.Experts() for _ in range(3))

        def forward(self, tokens: Tensor) -> Tensor:
            x = self.tok(tokens) + self.pos(torch.arange(tokens.shape[1], device=tokens.device))
            for layer in (*self.blocks, *self.layers, self.layers[0]):
                x = x + layer(x)
            return self.head(self.norm(x))

    model = zoo.loud(Many())
    program = linearize.capture(model)
    assert program.leaves == ("layers.0", "layers.1", "layers.2")
    assert program.captured_by == "torch.export with 3 opaque leaves (layers.0, layers.1, layers.2)"
    calls = [node.target for node in program.graph.nodes if LEAF in node.meta]
    assert calls == ["layers.0", "layers.1", "layers.2", "layers.0"]
    ids = zoo.tokens(3, 7)
    assert zoo.difference(program.module(ids), model(ids)) <= 1e-5


def test_a_pointwise_leaf_compiles_fits_and_runs_step_by_step() -> None:
    (model, program), compiled = opaque("experts"), compiled_experts()
    ids = zoo.tokens(2, 15)
    with torch.no_grad():
        expected, state, found = model(ids), None, []
        for part in ids.split((4, 1, 10), dim=1):
            logits, state = compiled.step(part, state)
            found.append(logits)
    assert zoo.difference(torch.cat(found, 1), expected) <= 1e-4
    fitted = linearize.compile(program, "lolcats{window=4}", tokens=256, progress=False)
    assert fitted.program.leaves == ("extra.0",)
    assert fitted.report.sites[0].error_fitted is not None


@pytest.mark.parametrize("name", ["recurrence", "chunked scan"])
def test_a_leaf_that_mixes_tokens_is_continued_from_its_history(name: str) -> None:
    model, program = opaque(name)
    compiled = linearize.compile(program, "none", progress=False)
    ids = zoo.tokens(2, 37)
    with torch.no_grad():
        expected, state, found = model(ids), None, []
        for part in ids.split((4, 1, 30, 2), dim=1):
            logits, state = compiled.step(part, state)
            found.append(logits)
    assert zoo.difference(torch.cat(found, 1), expected) <= 1e-4


def test_the_source_keeps_its_mode_when_the_compiled_model_changes_its_own() -> None:
    model = with_extra(parts.Experts).train()
    compiled = linearize.compile(model, "none", progress=False)
    assert all(module.training for module in model.modules())
    compiled.train()
    model.eval()
    assert compiled.graph_module.get_submodule("extra.0").training
    assert not any(module.training for module in model.modules())


def test_a_module_whose_state_another_resets_is_opaque_together_with_it() -> None:
    model = with_extra(parts.Resets)
    program = linearize.capture(model)
    assert program.leaves == ("extra.0",)
    for batch, length in ((2, 5), (3, 9)):
        ids = zoo.tokens(batch, length)
        with torch.no_grad():
            assert zoo.difference(program.module(ids), model(ids)) <= 1e-5


@pytest.mark.parametrize("name", ["experts", "recurrence", "dynamic angles"])
def test_without_weights_random_numbers_stand_in_for_a_leaf(name: str) -> None:
    part, call, mixes = OPAQUE[name]
    with torch.device("meta"):
        model = With(part(), call)
    program = linearize.capture(model)
    assert program.leaves == ("extra.0",)
    assert leaf_notes(program)["extra.0"]["mixes_tokens"] is mixes
    assert len(program.matched) == 1
    assert program.notes[-1].startswith("without weights, what is known of opaque modules")
    assert all(parameter.device.type == "meta" for parameter in model.parameters())


def test_without_weights_conditions_on_the_length_are_told() -> None:
    with torch.device("meta"):
        model = With(parts.ChunkedScan())
    assert "from length 33 on" in linearize.capture(model).notes[-1]


def test_hooks_of_a_leaf_run_once() -> None:
    model = with_extra(parts.Experts)
    model.get_submodule("extra.0").register_forward_hook(lambda module, args, output: output * 3)
    program = linearize.capture(model)
    ids = zoo.tokens(2, 9)
    with torch.no_grad():
        assert zoo.difference(program.module(ids), model(ids)) <= 1e-5
    assert len(model.get_submodule("extra.0")._forward_hooks) == 1


def test_saving_and_exporting_name_the_leaves(tmp_path: Path) -> None:
    compiled = compiled_experts()
    with pytest.raises(ArtifactError, match=r"extra\.0 could not be traced and run the source's Python code"):
        compiled.save_pretrained(tmp_path / "saved")
    with pytest.raises(ExportError, match=r"extra\.0 could not be traced and run the source's Python code"):
        linearize.export(compiled, tmp_path / "exported")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        (parts.AttentionByValue, r"cannot trace With in module 'extra\.0'.*extra\.0 runs attention, so it cannot be"),
        (parts.Noisy, r"extra\.0 cannot be left opaque: it returns other values each time"),
        (parts.InPlace, r"extra\.0 cannot be left opaque: it writes into the tensors that it is given"),
    ],
)
def test_a_module_that_cannot_stand_opaque_is_refused_with_its_reason(part: Any, reason: str) -> None:
    with pytest.raises(CaptureError, match=reason):
        linearize.capture(with_extra(part))


def test_an_operator_with_as_many_rows_as_the_values_say_needs_no_leaf() -> None:
    model = with_extra(lambda: parts.Nonzero(looks=False), parts.scale_by_rows)
    program = linearize.capture(model)
    assert not program.leaves
    ids = zoo.tokens(3, 9)
    assert zoo.difference(program.module(ids), model(ids)) <= 1e-5


def test_a_result_as_long_as_the_values_say_is_refused() -> None:
    model = with_extra(lambda: parts.Nonzero(looks=True), parts.scale_by_rows)
    with pytest.raises(CaptureError, match=r"dim 0 of its output 0 is \[.*\], no simple function of its inputs' dims"):
        linearize.capture(model)


@pytest.mark.parametrize("fails", [False, True], ids=["succeeds", "fails"])
def test_the_model_is_left_as_it_was(fails: bool) -> None:
    """Attributes, containers, objects, buffers and forwards; where a leaf was needed and where the capture fails."""
    model = With(parts.Caching(fails=True))
    part = model.extra[0]
    if not fails:
        model = with_extra(lambda: part)
    else:
        model.blocks.append(parts.AttentionByValue())  # type: ignore[operator]
    model.train()
    before = {name: (dict(module.__dict__), module.forward) for name, module in model.named_modules()}
    state = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    if fails:
        with pytest.raises(CaptureError):
            linearize.capture(model)
    else:
        assert linearize.capture(model).leaves == ("extra.0",)
    for name, module in model.named_modules():
        attributes, forward = before[name]
        assert module.__dict__.keys() == attributes.keys()
        assert all(module.__dict__[key] is value for key, value in attributes.items()), name
        assert module.forward == forward
        assert module.training
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert tensor is state[name][0]
        assert torch.equal(tensor, state[name][1])
    assert (part.last, part.kept, part.holder.__dict__) == (None, {}, {})


def test_static_sizes_are_the_last_resort_and_said_loudly() -> None:
    model = with_extra(parts.LoopInAttention)
    program = linearize.capture(model)
    assert (program.fixed_batch, program.fixed_length) == (None, 13)
    assert program.captured_by == "torch.export at a static length"
    assert "captured at a static length 13, to be looked at only" in program.notes[0]
    assert "extra.0 runs attention" in program.notes[0]
    ids = zoo.tokens(3, 13)
    with torch.no_grad():
        assert zoo.difference(program.module(ids), model(ids)) <= 1e-5
    with pytest.raises(CaptureError, match="captured at a static length of 13 and is right for no other"):
        program.module(zoo.tokens(3, 14))
    with pytest.raises(RewriteError, match=r"static length 13 only.*extra\.0 runs attention"):
        linearize.compile(program, "none", progress=False)
    assert program.refused
    assert not program.matched
    assert linearize.inspect(program)["captured_by"] == "torch.export at a static length"


def test_output_shapes_follow_batch_length_and_their_product() -> None:
    class Shapes(nn.Module):
        def forward(self, x: Tensor, n: int) -> tuple[Tensor, ...]:
            flat = x.reshape(-1, x.shape[-1])
            return flat, x.mT, torch.zeros(n + 2), torch.zeros(5, 2 * n), x.repeat_interleave(3, 0)

    module = Shapes()
    calls = []
    for batch, length in ((2, 13), (3, 17), (5, 11)):
        with recorded(module, [""], length) as recording:
            module(torch.zeros(batch, length, 6), length)
        calls += recording.calls[""]
    shapes = learn_shapes(calls)
    found = shapes([torch.zeros(4, 7, 6), 7], {})
    assert [tuple(tensor.shape) for tensor in found] == [(28, 6), (4, 6, 7), (9,), (5, 14), (12, 7, 6)]
    assert found[1].stride() == (42, 1, 6)


DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
JAMBA = {
    "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
    "num_experts": 4, "num_experts_per_tok": 2, "mamba_d_state": 4, "mamba_dt_rank": 4, "use_mamba_kernels": False,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "options", "leaf"),
    [
        ("llama", {"num_hidden_layers": 1, "rope_parameters": DYNAMIC_ROPE}, "model.rotary_emb"),
        ("jamba", JAMBA, "model.layers.0.mamba"),
    ],
)
def test_families_of_transformers_with_an_untraceable_module(kind: str, options: dict[str, Any], leaf: str) -> None:
    model = zoo.hf(kind, **options)()
    compiled = linearize.compile(model, "none", progress=False)
    assert compiled.program.leaves == (leaf,)
    assert len(compiled.program.matched) == 1
    ids = zoo.tokens(3, 20)
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        assert zoo.difference(compiled(ids).logits, expected) <= 1e-5
        first, state = compiled.step(ids[:, :12])
        second, _ = compiled.step(ids[:, 12:], state)
    assert zoo.difference(torch.cat((first, second), 1), expected) <= 1e-4
