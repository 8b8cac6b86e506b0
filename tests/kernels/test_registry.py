"""The registry: priorities, reasons, the fallback, and what `linearize doctor` prints."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import linearize.kernels
from linearize.errors import LinearizeError
from linearize.kernels import Kernel, choose, explain, install, kernels_for, recording, register, registry
from linearize.kernels.cpu import GLA_STEP, GLA_STREAM
from linearize.ops import OPERATORS, gla_chunk, hybrid_ring
from tests import zoo


@pytest.fixture(autouse=True)
def _restored_registry(monkeypatch):
    monkeypatch.setattr(registry, "_KERNELS", dict(registry._KERNELS))


def arguments(length=3):
    return tuple(torch.randn(1, length, 2, 4) for _ in range(3))


def answering(value, **fields):
    """A kernel for gla_chunk that answers with constants."""

    def run(q, k, v, *args, **kwargs):
        return torch.full_like(q, value), q.new_zeros(1, 2, 4, 4)

    return replace(GLA_STREAM, **{"name": f"test.{value}", "priority": 100, "run": run} | fields)


# one product a tap: linear in the length, and nothing to fuse in PyTorch; one product of matrices a group
REFERENCE_IS_ENOUGH = {"short_conv", "grouped_mm"}


def test_every_operator_has_a_cpu_kernel():
    for op in OPERATORS:
        assert kernels_for(op, "cpu") or op in REFERENCE_IS_ENOUGH, op


def test_the_kernel_with_the_highest_priority_runs():
    register(answering(1))
    register(answering(3, priority=300))
    register(answering(2, priority=200))
    assert (gla_chunk(*arguments())[0] == 3).all()
    assert choose("gla_chunk", "cpu", arguments(), {})[0].name == "test.3"


def test_a_kernel_that_declines_is_passed_over_with_its_reason():
    register(answering(1, check=lambda *args, **kwargs: "only on Sundays"))
    kernel, declined = choose("gla_chunk", "cpu", arguments(), {})
    assert kernel is GLA_STREAM
    assert declined == [("test.1", "only on Sundays"), ("cpu.gla_step", "T is 3, not 1")]
    assert not (gla_chunk(*arguments())[0] == 1).all()


def test_one_token_takes_the_step_kernel():
    assert choose("gla_chunk", "cpu", arguments(length=1), {}) == (GLA_STEP, [])


def test_a_kernel_that_is_missing_here_never_runs():
    register(answering(1, missing="needs a moon"))
    kernel, declined = choose("gla_chunk", "cpu", arguments(), {})
    assert kernel is GLA_STREAM
    assert declined[0] == ("test.1", "needs a moon")
    assert not (gla_chunk(*arguments())[0] == 1).all()
    assert explain("gla_chunk", "cpu")[0] == ("test.1", "needs a moon")


def test_an_unclaimed_call_runs_the_reference(monkeypatch):
    args = arguments()
    monkeypatch.setitem(registry._KERNELS, ("gla_chunk", "cpu"), ())
    kernel, declined = choose("gla_chunk", "cpu", args, {})
    assert (kernel, declined) == (None, [])
    for found, expected in zip(gla_chunk(*args), OPERATORS["gla_chunk"].reference(*args), strict=True):
        assert torch.equal(found, expected)


def test_explain_lists_the_kernels_and_the_reference_last():
    assert explain("gla_chunk", "cpu") == [
        ("cpu.gla_step", "available"),
        ("cpu.gla_stream", "available"),
        ("reference", "available"),
    ]
    assert [name for name, _ in explain("gla_chunk", "cuda")] == [
        "triton.gla_one",
        "triton.gla_chunk",
        "fla.chunk_simple_gla",
        "torch.gla_step",
        "torch.gla_stream",
        "triton.gla_backward",
        "reference",
    ]


def test_registering_again_replaces_the_kernel_of_that_name():
    register(answering(1))
    register(answering(2, name="test.1"))
    assert [kernel.name for kernel in kernels_for("gla_chunk", "cpu")].count("test.1") == 1
    assert (gla_chunk(*arguments())[0] == 2).all()


def test_installing_twice_is_harmless():
    install()
    linearize.kernels.install()
    assert (gla_chunk(*arguments())[0]).isfinite().all()


@pytest.mark.parametrize(
    ("field", "message"), [({"op": "glaa"}, "no operator glaa"), ({"device": "abacus"}, "no device type abacus")]
)
def test_a_kernel_for_nothing_known_is_refused(field, message):
    with pytest.raises(LinearizeError, match=message):
        register(replace(GLA_STREAM, **field))


def test_a_recording_says_which_kernel_took_each_call_and_why_others_did_not():
    register(answering(1, check=lambda *args, **kwargs: "only on Sundays"))
    with recording() as calls:
        gla_chunk(*arguments())
        gla_chunk(*arguments(length=1))
    gla_chunk(*arguments())
    assert [str(call) for call in calls] == [
        "gla_chunk [1, 3, 2, 4]: cpu.gla_stream; not test.1: only on Sundays; not cpu.gla_step: T is 3, not 1",
        "gla_chunk [1, 1, 2, 4]: cpu.gla_step; not test.1: only on Sundays",
    ]


def test_an_operator_made_of_others_runs_their_kernels_where_none_claims_it():
    x, ring = torch.randn(1, 3, 2, 4), torch.zeros(1, 2, 2, 4)
    mask = torch.ones(1, 3, dtype=torch.bool)
    with recording() as calls:
        hybrid_ring(x, x, x, mask, torch.arange(3)[None], ring, ring, ring[..., 0, 0] > 0, window=2, scale=1.0)
    assert [(call.op, call.kernel) for call in calls] == [
        ("hybrid_ring", "reference"),
        ("hybrid_chunk", "cpu.hybrid_stream"),
    ]


def test_the_compile_report_names_kernels_and_those_that_this_machine_lacks():
    register(answering(1, op="hybrid_ring", missing="needs a moon"))
    compiled = zoo.compile_again("llama", "window{window=4}")
    report = compiled.report
    assert set(report.kernels.values()) <= {kernel.name for kernel in kernels_for("hybrid_ring", "cpu")} | {"reference"}
    assert report.declined["test.1"] == "needs a moon"


def test_a_kernel_is_a_value():
    assert replace(GLA_STEP) == GLA_STEP
    assert isinstance(hash(GLA_STEP), int)
    assert Kernel.__dataclass_params__.frozen
