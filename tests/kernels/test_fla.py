"""flash-linear-attention as a backend: who is turned away and why, and what it is called with.

The package needs a GPU. A stand-in with its names and signatures, over our recurrences, shows that arguments and states
are mapped; whether its kernels are right is for the benchmark on a GPU to find.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from linearize.kernels import choose, fla, registry
from linearize.ops import OPERATORS
from tests.ops.helpers import assert_near


def recurrence(name):
    return OPERATORS[name].recurrence


def chunk_simple_gla(q, k, v, g=None, scale=None, initial_state=None, output_final_state=False):
    o, s = recurrence("gla_chunk")(q, k, v, g, initial_state, scale=scale)
    return o, s if output_final_state else None


def chunk_gla(q, k, v, g, scale=None, initial_state=None, output_final_state=False):
    o, s = recurrence("gla_vec_chunk")(q, k, v, g, initial_state, scale=scale)
    return o, s if output_final_state else None


def chunk_delta_rule(
    q, k, v, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False
):
    o, s = recurrence("delta_chunk")(q, k, v, beta, None, initial_state, scale=scale, l2norm=use_qk_l2norm_in_kernel)
    return o, s if output_final_state else None


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False
):
    o, s = recurrence("delta_chunk")(q, k, v, beta, g, initial_state, scale=scale, l2norm=use_qk_l2norm_in_kernel)
    return o, s if output_final_state else None


@pytest.fixture
def _stand_in(monkeypatch):
    functions = {
        "simple_gla": chunk_simple_gla,
        "gla": chunk_gla,
        "delta_rule": chunk_delta_rule,
        "gated_delta_rule": chunk_gated_delta_rule,
    }
    for package in ("fla", "fla.ops"):
        monkeypatch.setitem(sys.modules, package, ModuleType(package))
    for name, function in functions.items():
        module = ModuleType(f"fla.ops.{name}")
        setattr(module, function.__name__, function)
        monkeypatch.setitem(sys.modules, f"fla.ops.{name}", module)


def tokens(length=70):
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 3, 8) for _ in range(3))
    return q, k, v, torch.randn(2, 3, 8, 8)


@pytest.mark.usefixtures("_stand_in")
def test_arguments_and_states_are_mapped():
    q, k, v, s0 = tokens()
    gate, gates, beta = -torch.rand(2, 70, 3), -torch.rand(2, 70, 3, 8), torch.rand(2, 70, 3)
    calls = (
        ("gla_chunk", fla.gla, (q, k, v, gate, s0), {}),
        ("gla_chunk", fla.gla, (q, k, v), {}),
        ("gla_vec_chunk", fla.gla_vec, (q, k, v, gates, s0), {}),
        ("delta_chunk", fla.delta, (q, k, v, beta, gate, s0), {"l2norm": True}),
        ("delta_chunk", fla.delta, (q, k, v, beta), {"l2norm": True}),
    )
    for name, run, args, keywords in calls:
        assert_near(run(*args, scale=0.3, **keywords), recurrence(name)(*args, scale=0.3, **keywords))


def on_gpu(length=128, heads=4, kv_heads=4, dim=64, dtype=torch.bfloat16, cuda=True):
    """What the check looks at of a call's tensors."""

    def make(count):
        shape = (2, length, count, dim)
        return SimpleNamespace(shape=shape, dtype=dtype, is_cuda=cuda, device=torch.device("cuda" if cuda else "cpu"))

    return make(heads), make(kv_heads), make(kv_heads)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, None),
        ({"cuda": False}, "q is on cpu"),
        ({"dtype": torch.float32}, "torch.float32: it multiplies float32 in TF32"),
        ({"dtype": torch.float64}, "torch.float64"),
        ({"kv_heads": 2}, "4 query heads share 2 kv heads"),
        ({"dim": 320}, "head dim 320, at most 256"),
        ({"length": 1}, "T is 1, fewer than 64"),
    ],
)
def test_calls_are_claimed_or_declined_with_the_reason(monkeypatch, change, reason):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fla.check_gla(*on_gpu(**change), object()) == reason
    assert fla.check_delta(*on_gpu(**change), object(), None) == reason


@pytest.mark.parametrize(
    ("gated", "capability", "triton", "refused"),
    [
        (True, (9, 0), (3, 4, 0), True),
        (True, (9, 0), (3, 6, 0), True),
        (True, (9, 0), (3, 7, 0), True),
        (True, (9, 0), (3, 7, 1), False),
        (True, (9, 0), (3, 3, 1), False),
        (False, (9, 0), (3, 6, 0), False),
        (True, (8, 0), (3, 6, 0), False),
    ],
)
def test_where_triton_miscompiles_gated_kernels_they_are_refused(gated, capability, triton, refused):
    reason = fla.wrong_here(gated, capability, triton)
    assert (reason is not None) == refused
    assert reason is None or reason.startswith(
        f"Triton {'.'.join(map(str, triton))} miscompiles gated kernels on Hopper"
    )


def test_it_says_what_is_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert fla.missing.__wrapped__() == "flash-linear-attention is not installed: pip install 'linearize[fla]'"
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert fla.missing.__wrapped__().startswith("torch finds no GPU")


def test_our_own_kernels_are_asked_first_and_plain_torch_last():
    for op in ("gla_chunk", "gla_vec_chunk", "delta_chunk"):
        names = [kernel.name.partition(".")[0] for kernel in registry.kernels_for(op, "cuda")]
        at = names.index("fla")
        assert "torch" not in names[:at] or op != "gla_chunk"
        assert "triton" not in names[at:]
        assert names[-1] == "torch"


def test_a_cpu_call_never_asks_it():
    q, k, v, _ = tokens()
    assert all(not name.startswith("fla") for name, _ in choose("gla_chunk", "cpu", (q, k, v), {})[1])
