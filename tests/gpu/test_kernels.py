"""Every Triton kernel on a real GPU: each configuration against float64, twice the same, in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch

from linearize.kernels import choose
from linearize.kernels.triton import _launch
from linearize.ops import OPERATORS
from linearize.ops._backward import BACKWARDS, Backward

DEVICE = "cuda"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Largest difference over the largest value. float32 multiplies in full precision unless tf32 is allowed.
BOUND = {torch.bfloat16: 3e-2, torch.float16: 1e-2, torch.float32: 1e-5}
LENGTHS = (1, 63, 64, 65, 200, 1000)
Call = tuple[str, tuple[Any, ...], dict[str, Any]]


@pytest.fixture(autouse=True)
def _full_precision() -> Iterator[None]:
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def normal(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(dtype).to(DEVICE)


def gates(*shape: int) -> torch.Tensor:
    """Gentle ones, and one of -80 in ten."""
    found = -0.1 * normal(*shape, dtype=torch.float32).abs()
    return torch.where(normal(*shape, dtype=torch.float32, seed=1) > 1.28, -80.0, found)


def gla(dtype: torch.dtype, length: int, dim: int) -> Call:
    q, k, v = (normal(2, length, h, dim, dtype=dtype, seed=h) for h in (4, 2, 2))
    s0 = normal(2, 2, dim, dim, dtype=torch.float32)
    return "gla_chunk", (q, k, v, gates(2, length, 2), s0), {"scale": dim**-0.5}


def hybrid(dtype: torch.dtype, length: int, dim: int) -> Call:
    q = normal(2, length, 4, dim, dtype=dtype)
    k, v = (normal(2, length + 64, 2, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    fq, fk = (normal(2, length, h, 96, dtype=dtype, seed=h).abs() for h in (4, 2))
    mask = torch.arange(length + 64, device=DEVICE) >= torch.tensor([[64], [20]], device=DEVICE)
    mix = torch.rand(4, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return "hybrid_chunk", (q, k, v, mask, fq, fk, mix), {"sink_logits": mix[:, None], "window": 64, "scale": dim**-0.5}


def slots(dtype: torch.dtype, length: int, dim: int) -> Call:
    window = max(length, 16)
    q = normal(2, length, 4, dim, dtype=dtype)
    k, v = (normal(2, window + length, 2, dim, dtype=dtype, seed=seed) for seed in (1, 2))
    slot_k, slot_v = (normal(2, 2, 50, dim, dtype=torch.float32, seed=s) for s in (3, 4))
    count = (3 * normal(2, 2, 50, dtype=torch.float32)).floor().clamp(min=0)
    return "slots_block", (q, k, v, slot_k, slot_v, count), {"window": window, "scale": dim**-0.5}


def mla(dtype: torch.dtype, length: int, dim: int) -> Call:
    rank, rope = 4 * dim, dim // 2
    q, cache = normal(2, 20, rank + rope, dtype=dtype), normal(2, 9 * length, rank + rope, dtype=dtype)
    lens = torch.tensor([9 * length, 1 + 4 * length], device=DEVICE)
    return "mla_decode", (q, cache, lens), {"rank": rank, "scale": (rank + rope) ** -0.5}


def delta(dtype: torch.dtype, length: int, dim: int) -> Call:
    _, (q, k, v, g, s0), keywords = gla(dtype, length + 1, dim)
    beta = torch.rand(2, length + 1, 2, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    return "delta_chunk", (q, k, v, beta, g, s0), keywords | {"l2norm": True}


def gla_vec(dtype: torch.dtype, length: int, dim: int) -> Call:
    _, (q, k, v, _, s0), keywords = gla(dtype, length + 1, dim)
    return "gla_vec_chunk", (q, k, v, gates(2, length + 1, 2, dim), s0), keywords


MAKERS: dict[str, Callable[[torch.dtype, int, int], Call]] = {
    "gla": gla, "gla_vec": gla_vec, "delta": delta, "hybrid": hybrid, "slots": slots, "mla": mla,
}  # fmt: skip


def wide(x: Any) -> Any:
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def truth(call: Call) -> tuple[torch.Tensor, ...]:
    """Standard operators in float64, on the same device."""
    name, args, keywords = call
    return OPERATORS[name].streamed(*map(wide, args), **{key: wide(value) for key, value in keywords.items()})


def assert_near(found: Any, expected: Any, dtype: torch.dtype) -> None:
    for a, b in zip(found, expected, strict=True):
        assert torch.isfinite(a).all()
        difference = (a.double() - b).abs().max().item() if a.numel() else 0.0
        assert difference <= BOUND[dtype] * max(1.0, b.abs().max().item() if b.numel() else 1.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", MAKERS)
def test_the_operator_runs_its_triton_kernel_and_equals_the_truth(name, length, dtype):
    for dim in (64, 128, 40):
        call = op, args, keywords = MAKERS[name](dtype, length, dim)
        if dim == 128 and name == "mla" and dtype == torch.float32:
            continue  # 576 dims of float32 in registers
        assert choose(op, DEVICE, args, keywords)[0].name.startswith("triton.")
        assert_near(OPERATORS[op].overload(*args, **keywords), truth(call), dtype)


@pytest.mark.parametrize("name", MAKERS)
def test_every_configuration_gives_the_same_as_the_truth(monkeypatch, name):
    """Not only the fastest: Hopper was miscompiled for some block sizes and not for others."""
    call = op, args, keywords = MAKERS[name](torch.bfloat16, 300, 64)
    run, most = _launch.run, [1]
    for chosen in range(4):

        def launch(kernel, grid, args, constants, configs, chosen=chosen):
            most[0] = max(most[0], len(configs))
            run(kernel, grid, args, constants, configs[min(chosen, len(configs) - 1)])

        monkeypatch.setattr(_launch, "launch", launch)
        assert_near(OPERATORS[op].overload(*args, **keywords), truth(call), torch.bfloat16)
        if chosen + 1 >= most[0]:
            break


@pytest.mark.parametrize("name", MAKERS)
def test_two_runs_give_the_same_bits(name):
    op, args, keywords = MAKERS[name](torch.bfloat16, 4000, 128)
    first, *others = (OPERATORS[op].overload(*args, **keywords) for _ in range(5))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def gradients(form: Callable[..., Any], args: Sequence[Any], keywords: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """Those of the sum of squares of all outputs."""
    leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in args]
    outputs = [x.double().square().sum() for x in form(*leaves, **keywords)]
    return torch.autograd.grad(outputs, [x for x in leaves if x.requires_grad])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("name", ["gla", "gla_vec", "delta", "hybrid"])
def test_gradients_come_from_the_kernel_and_equal_autograd(monkeypatch, name, length, dtype):
    op, args, keywords = MAKERS[name](dtype, length, 64)
    backward, calls = BACKWARDS[op, "cuda"], []
    run = lambda *call: calls.append(call) or backward.run(*call)  # noqa: E731
    monkeypatch.setitem(BACKWARDS, (op, "cuda"), Backward(backward.claims, run))
    found = gradients(OPERATORS[op].overload, args, keywords)
    expected = gradients(OPERATORS[op].streamed, [*map(wide, args)], {key: wide(x) for key, x in keywords.items()})
    assert calls
    for a, b in zip(found, expected, strict=True):
        assert (a.double() - b).norm() <= 2 * BOUND[dtype] * b.norm() + 1e-6


@pytest.mark.parametrize("name", ["gla", "gla_vec", "delta", "hybrid"])
def test_a_compiled_graph_has_the_same_gradients(name):
    op, args, keywords = MAKERS[name](torch.bfloat16, 200, 64)
    compiled = torch.compile(lambda *tokens: OPERATORS[op].overload(*tokens, **keywords), fullgraph=True)
    for a, b in zip(gradients(compiled, args, {}), gradients(OPERATORS[op].overload, args, keywords), strict=True):
        torch.testing.assert_close(a, b)


# ---- decode ----------------------------------------------------------------------------------------------------------


def hybrid_pools(batch: int, window: int, dim: int, features: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    rings = {"ring_k": dim, "ring_v": dim, "ring_f": features}
    pools = {name: torch.zeros(batch, 2 * window, 2, size, dtype=dtype, device=DEVICE) for name, size in rings.items()}
    s = torch.zeros(batch, 2, features, dim, device=DEVICE)
    return pools | {"s": s, "z": torch.zeros(batch, 2, features, device=DEVICE)}


def hybrid_tokens(batch: int, length: int, dim: int, features: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    q, k, v = (normal(batch, length, h, dim, dtype=dtype, seed=s) for s, h in enumerate((8, 2, 2)))
    fq, fk = (normal(batch, length, h, features, dtype=dtype, seed=h).abs() for h in (8, 2))
    return q, k, v, fq, fk


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_hybrid_steps_equal_the_truth(dtype):
    batch, window, tokens = 5, 16, hybrid_tokens(5, 60, 64, 48, dtype)
    pools, wider = (hybrid_pools(batch, window, 64, 48, kind) for kind in (dtype, torch.float64))
    wider |= {name: wider[name].double() for name in ("s", "z")}
    keywords = {"window": window, "scale": 0.125}
    for t in range(60):
        now, pos = [x[:, t : t + 1] for x in tokens], torch.full((batch,), t, device=DEVICE)
        o = OPERATORS["hybrid_step"].overload(*now, pos, **pools, **keywords)
        expected = OPERATORS["hybrid_step"].reference(*map(wide, now), pos, **wider, **keywords)
        assert_near((o, pools["s"], pools["z"]), (expected, wider["s"], wider["z"]), dtype)


def captured(call: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """A call in a CUDA graph, after a run of its own that compiles it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


def test_hybrid_steps_replay_from_one_cuda_graph():
    batch, window, tokens = 4, 16, hybrid_tokens(4, 70, 64, 48, torch.bfloat16)
    pools, checked = (hybrid_pools(batch, window, 64, 48, torch.bfloat16) for _ in range(2))
    now, pos = [x[:, :1].clone() for x in tokens], torch.zeros(batch, dtype=torch.int64, device=DEVICE)
    keywords = {"window": window, "scale": 0.125}
    graph, o = captured(lambda: OPERATORS["hybrid_step"].overload(*now, pos, **pools, **keywords))
    for pool in pools.values():
        pool.zero_()
    for t in range(70):
        for held, x in zip(now, tokens, strict=True):
            held.copy_(x[:, t : t + 1])
        pos.fill_(t)
        graph.replay()
        fresh = [x[:, t : t + 1] for x in tokens]
        assert torch.equal(o, OPERATORS["hybrid_step"].overload(*fresh, pos.clone(), **checked, **keywords))
    assert all(torch.equal(pools[name], checked[name]) for name in pools)


@pytest.mark.parametrize("name", ["gla_step", "gla_vec_step", "delta_step"])
def test_steps_replay_from_one_cuda_graph_with_other_rows(name):
    q, k, v = (normal(3, 1, h, 64, dtype=torch.bfloat16, seed=h) for h in (8, 2, 2))
    g, pool = gates(3, 1, 2, 64), torch.zeros(9, 2, 64, 64, device=DEVICE)
    more = {"gla_step": (g[..., 0],), "gla_vec_step": (g,), "delta_step": (g[..., 0].exp(), g[..., 1])}[name]
    index, keywords = torch.tensor([0, 1, 2], device=DEVICE), {"scale": 0.1}
    keywords |= {"l2norm": True} if name == "delta_step" else {}
    graph, o = captured(lambda: OPERATORS[name].overload(q, k, v, *more, pool, index, **keywords))
    for rows in ([3, 8, 0], [8, 2, 5]):
        index.copy_(torch.tensor(rows))
        before = pool.double()
        expected = OPERATORS[name].reference(*map(wide, (q, k, v, *more)), before, index, **keywords)
        graph.replay()
        assert_near((o, pool), (expected, before), torch.bfloat16)


def test_latent_attention_replays_from_one_cuda_graph_with_other_lengths():
    q, cache = normal(3, 16, 160, dtype=torch.bfloat16), normal(3, 3000, 160, dtype=torch.bfloat16)
    lens = torch.tensor([3000, 1, 7], device=DEVICE)
    graph, found = captured(lambda: OPERATORS["mla_decode"].overload(q, cache, lens, rank=128, scale=0.1))
    for rows in ([3000, 1, 7], [2, 2999, 640]):
        lens.copy_(torch.tensor(rows))
        graph.replay()
        assert_near(found, truth(("mla_decode", (q, cache, lens), {"rank": 128, "scale": 0.1})), torch.bfloat16)
