"""`slots_chunk` on CPU: slots of several blocks first, one merge a block, then the attention of those blocks at once.

Letters as in `linearize.ops.slots`; N = B G kv heads in all, R query heads each, S the blocks read at once, D = d + dv
columns of an item x = [k ; v]. The line holds a row's tokens from the block before its first new one, padded to whole
blocks of its own ranks, so that rows at different places of a block stand side by side.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from linearize.kernels.cpu.native import library, run
from linearize.kernels.cpu.slot_merge import merge_full
from linearize.kernels.registry import Kernel, always, register
from linearize.ops._library import accumulation_dtype
from linearize.ops.slot_merge import aged, merge, round_sizes
from linearize.ops.slots import Outputs, Policy, Tokens, check_slots, take

BLOCKS = 8
PAIRS = 1 << 20  # scores at once


@dataclass
class _Slots:
    """x [B,G,C,D], n [B,G,C] and, on the host, how many tokens of each row have joined."""

    x: Tensor
    n: Tensor
    joined: list[int]
    key_dim: int
    policy: Policy

    def join(self, rows: list[int], left: Tensor) -> None:
        """The tokens left [B,G,w,D] of `rows` join the slots; x and n are replaced, never written to."""
        window, slots = left.shape[2], self.n.shape[2]
        kinds: dict[str, list[int]] = {}
        for row in rows:
            held = self.joined[row]
            kind = "append" if held + window <= slots else "full" if held >= slots else "mixed"
            kinds.setdefault(kind, []).append(row)
            self.joined[row] += window
        for kind, chosen in kinds.items():
            if len(chosen) == len(self.joined):
                self.x, self.n = self._joined(kind, self.x, self.n, left, chosen)
                return
            index = torch.tensor(chosen, device=left.device)
            new = self._joined(kind, self.x[index], self.n[index], left[index], chosen)
            self.x, self.n = (old.index_copy(0, index, x) for old, x in zip((self.x, self.n), new, strict=True))

    def _joined(self, kind: str, x: Tensor, n: Tensor, left: Tensor, rows: list[int]) -> tuple[Tensor, Tensor]:
        window, policy, ones = left.shape[2], self.policy, torch.ones_like(left[..., 0])
        if kind == "append":
            held = [self.joined[row] - window for row in rows]
            place = torch.tensor(held, device=n.device)[:, None] + torch.arange(window, device=n.device)
            place = place[:, None].expand(-1, n.shape[1], -1)
            return x.scatter(2, place[..., None].expand_as(left), left), n.scatter(2, place, ones)
        x, n = torch.cat([x, left], dim=2), torch.cat([aged(n, policy.sinks, policy.decay), ones], dim=2)
        if kind == "full":
            return merge_full(x, n, self.key_dim, policy.sizes, policy.sinks)
        k, v = x[..., : self.key_dim], x[..., self.key_dim :]
        k, v, n = merge(k, v, n, k, policy.sizes, policy.sinks)
        return torch.cat([k, v], dim=-1), n

    def outputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.x[..., : self.key_dim].contiguous(), self.x[..., self.key_dim :].contiguous(), self.n.clone()


def stream(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    before: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    *,
    window: int,
    scale: float,
    sinks: int = 0,
    rounds: int = 1,
    decay: float = 1.0,
) -> Outputs:
    """See `linearize.ops.slots`; no tensor of size T x T exists."""
    check_slots(q, k, v, mask, before, (ring_k, ring_v), (slot_k, slot_v, slot_n), window, sinks)
    sizes = round_sizes(slot_n.shape[2] + window, slot_n.shape[2], sinks, rounds)
    slots = _start(before, slot_k, slot_v, slot_n, window, q.dtype, Policy(sizes, sinks, decay))
    even = bool(mask.all()) and len(set(before.tolist())) == 1
    if even:
        new = Tokens(window, q, k, v, mask.sum(1), before, before % window, torch.empty(0))
    else:
        new = Tokens.of(q, k, v, mask, before, window)
    ends = (new.phase + new.total).tolist()
    length = max(1, -(-max(ends) // window)) * window
    reader = q.new_zeros(q.shape[0], length, *q.shape[2:], dtype=slots.x.dtype)
    line = slots.x.new_zeros(q.shape[0], k.shape[2], window + length, slots.x.shape[3])
    first = torch.div(before, window, rounding_mode="floor").tolist()
    if even:
        phase = ends[0] - q.shape[1]
        reader[:, phase : ends[0]].copy_(q).mul_(scale)
        _fill_line(line, new, ring_k, ring_v, phase)
        o = _read_blocks(reader, line, slots, ends, first, window)[:, phase : ends[0]].to(q.dtype).contiguous()
    else:
        place = new.phase[:, None] + torch.arange(q.shape[1], device=q.device)
        inside = place < torch.tensor(ends, device=q.device)[:, None]
        rows = torch.arange(q.shape[0], device=q.device)[:, None].expand_as(place)
        reader[rows[inside], place[inside]] = new.q[inside].to(reader.dtype) * scale
        _gather_line(line, new, ring_k, ring_v)
        o = _read_blocks(reader, line, slots, ends, first, window)
        o = o[rows, (new.phase[:, None] + new.order).clamp(max=length - 1)].to(q.dtype)
    end = new.before + new.total
    return (o, new.ring_at(end, ring_k, new.k), new.ring_at(end, ring_v, new.v), *slots.outputs())


def _start(
    before: Tensor, slot_k: Tensor, slot_v: Tensor, slot_n: Tensor, window: int, dtype: torch.dtype, policy: Policy
) -> _Slots:
    joined = [max(0, count // window - 1) * window for count in before.tolist()]
    wide = accumulation_dtype(dtype)
    return _Slots(torch.cat([slot_k, slot_v], -1).to(wide), slot_n.to(wide), joined, slot_k.shape[3], policy)


def _fill_line(line: Tensor, new: Tokens, ring_k: Tensor, ring_v: Tensor, phase: int) -> None:
    """The line where all rows stand at the same place and all their tokens are real."""
    window, start = new.window, new.window + phase
    held = torch.arange(-start, 0, device=line.device).add_(new.before[0]) % (2 * window)
    split = [new.k.shape[3], new.v.shape[3]]
    for part, ring, x in zip(line.split(split, dim=-1), (ring_k, ring_v), (new.k, new.v), strict=True):
        part[:, :, :start] = ring.index_select(1, held).transpose(1, 2)
        part[:, :, start : start + x.shape[1]] = x.transpose(1, 2)


def _gather_line(line: Tensor, new: Tokens, ring_k: Tensor, ring_v: Tensor) -> None:
    """line [B,G,w+length,D]: the block before a row's first new token, then whole blocks."""
    column = torch.arange(line.shape[2], device=ring_k.device)
    rank = (new.before - new.phase - new.window)[:, None] + column
    index = rank - new.before[:, None]
    arrived = (index >= 0)[:, :, None, None]
    parts = []
    for ring, x in ((ring_k, new.k), (ring_v, new.v)):
        held = take(ring, rank % ring.shape[1])
        parts.append(torch.where(arrived, take(x, index.clamp(0, x.shape[1] - 1)), held))
    line.copy_(torch.cat(parts, dim=-1).transpose(1, 2))


def _read_blocks(q: Tensor, line: Tensor, slots: _Slots, ends: list[int], first: list[int], window: int) -> Tensor:
    """q [B,blocks w,H,d], scaled, over the line and the slots, which move on; [B,blocks w,H,dv]."""
    batch, length, heads, head_dim = q.shape
    kv_heads, width = line.shape[1], line.shape[3]
    count, value_dim = slots.n.shape[2], width - head_dim
    columns = count + 2 * window
    at_once = max(1, min(BLOCKS, PAIRS // (batch * heads * window * columns)))
    q = q.view(batch, -1, window, kv_heads, heads // kv_heads, head_dim).permute(1, 0, 3, 4, 2, 5)
    o = q.new_empty(batch, length, heads, value_dim)
    o_SBGRWV = o.view(batch, -1, window, kv_heads, heads // kv_heads, value_dim).permute(1, 0, 3, 4, 2, 5)
    ahead = torch.ones(window, window, dtype=torch.bool, device=q.device).triu_(1)
    for start in range(0, length // window, at_once):
        size = min(at_once, length // window - start)
        items = q.new_empty(size, batch, kv_heads, columns, width)
        counts = q.new_empty(size, batch, kv_heads, count)
        _advance(items, counts, line, slots, ends, first, window, start)
        flat = items.view(-1, columns, width)
        reader = q[start : start + size].reshape(flat.shape[0], -1, head_dim)
        scores = torch.bmm(reader, flat[..., :head_dim].mT)
        scores_5 = scores.view(size, batch, kv_heads, -1, window, columns)
        scores_5[..., :count] += counts.log_()[:, :, :, None, None]
        scores_5[..., count + window :].masked_fill_(ahead, float("-inf"))
        if start == 0 and 0 in first:
            starts = torch.tensor([b == 0 for b in first], device=q.device)
            scores_5[0, :, ..., count : count + window].masked_fill_(starts[:, None, None, None, None], float("-inf"))
        mixed = torch.bmm(torch.softmax(scores, dim=-1), flat[..., head_dim:])
        o_SBGRWV[start : start + size] = mixed.view(size, batch, kv_heads, -1, window, value_dim)
    return o


def _advance(
    items: Tensor, counts: Tensor, line: Tensor, slots: _Slots, ends: list[int], first: list[int], window: int,
    start: int,
) -> None:  # fmt: skip
    """What the blocks from `start` on read, items [S,B,G,C+2w,D] and counts [S,B,G,C]; the slots move past them."""
    count, done = slots.n.shape[2], 0
    native = library("slots") if items.dtype == torch.float32 and len(set(ends)) == 1 == len(set(first)) else None
    while done < len(items):
        if native is not None:
            done += _advance_in_c(
                native, items[done:], counts[done:], line, slots, ends[0], first[0], window, start + done
            )
            if done == len(items):
                return
        block = start + done
        items[done, :, :, :count], counts[done] = slots.x, slots.n
        items[done, :, :, count:] = line[:, :, block * window : (block + 2) * window]
        rows = [b for b, end in enumerate(ends) if (block + 1) * window <= end and first[b] + block >= 1]
        if rows:
            slots.join(rows, line[:, :, block * window : (block + 1) * window])
        done += 1


def _advance_in_c(
    native: ctypes.CDLL, items: Tensor, counts: Tensor, line: Tensor, slots: _Slots, end: int, first: int, window: int,
    start: int,
) -> int:  # fmt: skip
    """The blocks that `slots.c` did: all, or those before the one whose join only just fills the slots."""
    policy, (batch, kv_heads, count, width) = slots.policy, slots.x.shape
    x, n, before = slots.x.contiguous().clone(), slots.n.contiguous().clone(), slots.joined[0]
    sizes = (
        batch * kv_heads, line.shape[2], width, slots.key_dim, window, count, policy.sinks, start, len(items),
        before, first, end // window, len(policy.sizes), *policy.sizes,
    )  # fmt: skip
    done = run(native.slots_advance, (line, x, n, items, counts), sizes, (policy.decay,))
    if done < 0:
        raise MemoryError("linearize::slots_chunk: no memory to merge slots in")
    joins = sum((block + 1) * window <= end and first + block >= 1 for block in range(start, start + done))
    slots.x, slots.n, slots.joined = x, n, [before + joins * window] * batch
    return done


def step(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    before: Tensor,
    ring_k: Tensor,
    ring_v: Tensor,
    slot_k: Tensor,
    slot_v: Tensor,
    slot_n: Tensor,
    *,
    window: int,
    scale: float,
    sinks: int = 0,
    rounds: int = 1,
    decay: float = 1.0,
) -> Outputs:
    """One token a row; the slots are merged only in the steps that complete a block."""
    check_slots(q, k, v, mask, before, (ring_k, ring_v), (slot_k, slot_v, slot_n), window, sinks)
    counts, real = before.tolist(), mask[:, 0].tolist()
    sizes = round_sizes(slot_n.shape[2] + window, slot_n.shape[2], sinks, rounds)
    slots = _start(before, slot_k, slot_v, slot_n, window, q.dtype, Policy(sizes, sinks, decay))
    column = (before % (2 * window))[:, None, None, None].expand_as(k)
    held = (
        torch.where(mask[:, :, None, None], x, ring.gather(1, column[..., : x.shape[3]]))
        for ring, x in ((ring_k, k), (ring_v, v))
    )
    ring_k, ring_v = (
        ring.scatter(1, column[..., : x.shape[3]], x) for ring, x in zip((ring_k, ring_v), held, strict=True)
    )
    o = _read_step(q, ring_k, ring_v, slots, counts, scale)
    ends = [count + int(one) for count, one in zip(counts, real, strict=True)]
    rows = [b for b, end in enumerate(ends) if real[b] and end % window == 0 and end > window]
    if rows:
        slots.join(rows, _leaving(ring_k, ring_v, ends, slots.x.dtype))
    return (o, ring_k, ring_v, *slots.outputs())


def _read_step(q: Tensor, ring_k: Tensor, ring_v: Tensor, slots: _Slots, counts: list[int], scale: float) -> Tensor:
    """q [B,1,H,d] over the ring, which holds its own key, and the slots; [B,1,H,dv]."""
    batch, _, heads, head_dim = q.shape
    dtype, key_dim, (kv_heads, count) = slots.x.dtype, slots.key_dim, slots.n.shape[1:]
    flat, columns = slots.x.flatten(0, 1), ring_k.shape[1]
    rows = (q.to(dtype) * scale).view(batch * kv_heads, heads // kv_heads, head_dim)
    keys, values = (x.to(dtype).transpose(1, 2).reshape(batch * kv_heads, columns, -1) for x in (ring_k, ring_v))
    near = torch.bmm(rows, keys.mT).view(batch, -1, columns)
    if len(set(counts)) == 1:
        near += _hidden(counts[0], columns, dtype)
    else:
        near += torch.stack([_hidden(c, columns, dtype) for c in counts])[:, None]
    near = near.view(batch * kv_heads, -1, columns)
    if slots.joined.count(0) == len(slots.joined):
        mixed = torch.bmm(torch.softmax(near, dim=-1), values)
    else:
        far = torch.baddbmm(slots.n.log().flatten(0, 1)[:, None], rows, flat[..., :key_dim].mT)
        weights = torch.softmax(torch.cat([far, near], dim=-1), dim=-1)
        mixed = torch.bmm(weights[..., :count], flat[..., key_dim:]).baddbmm_(weights[..., count:], values)
    return mixed.view(batch, 1, heads, -1).to(q.dtype)


def _hidden(count: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[2w] additive mask of the ring for the query of rank `count`: 0 where it may look, -inf elsewhere."""
    window = columns // 2
    own = count // window % 2 * window
    bias = torch.zeros(columns, dtype=dtype)
    bias[own + count % window + 1 : own + window] = float("-inf")
    if count < window:
        bias[window:] = float("-inf")
    return bias


def _leaving(ring_k: Tensor, ring_v: Tensor, ends: list[int], dtype: torch.dtype) -> Tensor:
    """x [B,G,w,D] of the block before the last complete one."""
    ring, window = torch.cat([ring_k, ring_v], dim=-1).to(dtype).transpose(1, 2), ring_k.shape[1] // 2
    halves = [end // window % 2 for end in ends]
    if len(set(halves)) == 1:
        return ring.narrow(2, halves[0] * window, window)
    which = torch.tensor(halves, device=ring.device).bool()[:, None, None, None]
    return torch.where(which, ring[:, :, window:], ring[:, :, :window])


def _check_step(q: Tensor, *args: object, **kwargs: object) -> str | None:
    return None if q.shape[1] == 1 else f"T is {q.shape[1]}, not 1"


SLOTS_STREAM = register(Kernel("cpu.slots_stream", "slots_chunk", "cpu", 10, always, stream))
SLOTS_STEP = register(Kernel("cpu.slots_step", "slots_chunk", "cpu", 20, _check_step, step))
