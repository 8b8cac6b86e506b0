"""What a computation costs, operator by operator, counted on tensors without values.

Every call of a torch function or operator is one Call, however many operators it is made of inside: the bytes of the
tensors that it reads and writes (a view moves nothing) and its arithmetic, a multiplication and an addition counting as
two. It is named after the operator inside that works most. Operators of `linearize` are one call each, as their kernels
are; what they compute is the formula below, from their shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

LOOKUPS = ("embedding", "index_select", "gather", "index")  # they read what they return, not the whole table
VIEW, MODULE = "view", "module"  # calls that compute nothing: another look at memory, and an nn.Module of a source
CHUNK = 64  # tokens that the chunked operators take at once: what is quadratic in them counts within a chunk


@dataclass(frozen=True)
class Call:
    """One operator: its name without namespace, bytes moved, arithmetic operations."""

    name: str
    bytes: int
    operations: int


class Counting:
    """Within it `calls` collects what runs."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self._inside = _Operators()
        self._outside = _Functions(self._inside.calls, self.calls)

    def __enter__(self) -> Counting:
        self._inside.__enter__()
        self._outside.__enter__()
        return self

    def __exit__(self, *problem: Any) -> None:
        self._outside.__exit__(*problem)
        self._inside.__exit__(*problem)


class _Operators(TorchDispatchMode):
    """Every operator that is dispatched, decomposed as far as that goes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.calls.append(_call(func, args, kwargs, result))
        return result


class _Functions(TorchFunctionMode):
    """Gathers the operators of every outermost function that runs any into one Call."""

    def __init__(self, inside: list[Call], calls: list[Call]) -> None:
        super().__init__()
        self.inside, self.calls = inside, calls

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = len(self.inside)
        result = func(*args, **(kwargs or {}))
        if len(self.inside) > start:
            self.calls.append(_together(self.inside[start:]))
        return result


def _together(calls: list[Call]) -> Call:
    heaviest = max(calls, key=lambda call: (call.operations, call.bytes))
    return Call(heaviest.name, sum(call.bytes for call in calls), sum(call.operations for call in calls))


def _call(func: Any, args: Any, kwargs: Any, result: Any) -> Call:
    name = func._schema.name.split("::")[-1]
    if _is_view(func) or not any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
        return Call(VIEW, 0, 0)
    tensors = [leaf for leaf in tree_leaves((args, kwargs, result)) if isinstance(leaf, Tensor)]
    moved = 2 * _bytes(result) if name in LOOKUPS else sum(_bytes(tensor) for tensor in tensors)
    return Call(name, moved, _operations(func, name, args, kwargs, result))


def _is_view(func: Any) -> bool:
    """Its result is another look at an argument's memory."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return bool(aliases) and all(alias is not None and not alias.is_write for alias in aliases)


def _bytes(tensor: Tensor) -> int:
    """Of the memory behind a tensor: a dim that is expanded is read once."""
    sizes = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0]
    return math.prod(sizes) * tensor.element_size()


def _operations(func: Any, name: str, args: Any, kwargs: Any, result: Any) -> int:
    formula = FORMULAS.get(name) if func.namespace == "linearize" else None
    if formula is not None:
        return int(formula(args, kwargs))
    packet = func.overloadpacket
    if packet in flop_registry:
        return int(flop_registry[packet](*args, **kwargs, out_val=result))
    return sum(leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor))


# ---- our own operators -----------------------------------------------------------------------------------------------


def _attention(args: Any, kwargs: Any) -> int:
    q, k, v = args[:3]
    keys = k.shape[2]
    window = kwargs.get("window", 0)
    seen = _mean_seen(q.shape[2], min(keys, window) if window else keys, keys)
    return int(2 * q.shape[0] * q.shape[1] * q.shape[2] * seen * (q.shape[3] + v.shape[3]))


def _mean_seen(queries: int, most: int, keys: int) -> float:
    """Keys that a causal query sees, on average, when it sees at most `most` of `keys`."""
    first = keys - queries + 1
    return most if first >= most else (most - (most - first) * (most - first + 1) / (2 * max(queries, 1)))


def _recurrence(updates: int) -> Callable[[Any, Any], int]:
    """Linear attention: reads q S by query head, `updates` products of the state's size by head that has one."""

    def formula(args: Any, kwargs: Any) -> int:
        q, k, v = args[:3]
        batch, length, heads, width = q.shape
        within = min(length, CHUNK) / 2 if length > 1 else 0
        state = width * v.shape[3]
        per_token = 2 * heads * state + 2 * updates * k.shape[2] * state + 2 * within * heads * (width + v.shape[3])
        return int(batch * length * per_token)

    return formula


def _hybrid(args: Any, kwargs: Any) -> int:
    """`hybrid_chunk`: window softmax, and a far field over the features fk [B,W+T,Hs,F] where there are any."""
    fk = args[5] if len(args) > 5 else kwargs.get("fk")
    return _window_and_far(args[0], args[2], kwargs["window"], 0 if fk is None else fk.shape[3], False)


def _hybrid_ring(args: Any, kwargs: Any) -> int:
    """The same, with the features made of key_map [G,d,f]."""
    key_map = args[11] if len(args) > 11 else kwargs.get("key_map")
    return _window_and_far(args[0], args[2], kwargs["window"], 0 if key_map is None else 2 * key_map.shape[2], True)


def _window_and_far(q: Tensor, v: Tensor, window: int, features: int, maps: bool) -> int:
    batch, length, heads, dim = q.shape
    near = 2 * heads * (window + 1) * (dim + v.shape[3])
    far = 2 * (heads + v.shape[2]) * features * v.shape[3]
    made = (heads + v.shape[2]) * dim * features if maps else 0
    return int(batch * length * (near + far + made))


def _slots(args: Any, kwargs: Any) -> int:
    """Attention to 2 w + C keys, and once every w tokens the distances of C + w items in `rounds` rounds."""
    q, k, v = args[:3]
    slots, window = args[9].shape[2], kwargs["window"]
    read = 2 * q.shape[2] * (2 * window + slots) * (q.shape[3] + v.shape[3])
    merge = k.shape[2] * kwargs.get("rounds", 1) * (slots + window) ** 2 / 2 * k.shape[3] / window
    return int(q.shape[0] * q.shape[1] * (read + merge))


def _evict(args: Any, kwargs: Any) -> int:
    """Attention to 2 w + C keys, and once every w tokens the scores of C + w items compared with each other."""
    q, k, v = args[:3]
    kept, window = args[7].shape[2], kwargs["window"]
    read = 2 * q.shape[2] * (2 * window + kept) * (q.shape[3] + v.shape[3])
    compare = k.shape[2] * (kept + window) * (kept + window + k.shape[3]) / window
    return int(q.shape[0] * q.shape[1] * (read + compare))


def _short_conv(args: Any, kwargs: Any) -> int:
    return int(2 * args[0].numel() * args[2].shape[-1])


FORMULAS: dict[str, Callable[[Any, Any], int]] = {
    "attention": _attention,
    "gla_chunk": _recurrence(1),
    "gla_vec_chunk": _recurrence(1),
    "delta_chunk": _recurrence(2),
    "hybrid_chunk": _hybrid,
    "hybrid_ring": _hybrid_ring,
    "slots_chunk": _slots,
    "evict_chunk": _evict,
    "short_conv": _short_conv,
}
