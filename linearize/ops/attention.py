"""`linearize::attention`, the canonical softmax attention that every matched site is raised to.

    s_ij = scale q_i.k_j;  s_ij <- softcap tanh(s_ij / softcap) if softcap > 0;  s_ij <- s_ij + bias_ij, or masked
    o_i  = sum_j e^{s_ij} v_j / ( sum_j e^{s_ij} + e^{sink_h} )            (0 where nothing is attended)

Shapes: q [B,H,T,d], k [B,G,S,d], v [B,G,S,dv], query head h reads kv head h // (H / G); bias broadcasts to [B,H,T,S], a
float that is added (half the dtype's minimum or less counts as masked) or a bool (True = may attend); sinks [H].
Alignment is lower-right: with `causal` query t sees keys j <= t + S - T, with `window` > 0 also j > t + S - T - window.
Order of soft-cap, mask and sinks as in transformers' eager attention (Gemma 2, gpt-oss). Softmax in float32, or
float64 for float64 inputs. The result has q's dtype and lies in memory as [B,T,H,dv].
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from linearize.ops._library import accumulation_dtype, define_operator, require

SCHEMA = (
    "attention(Tensor q, Tensor k, Tensor v, Tensor? bias=None, Tensor? sinks=None, *, "
    "float scale, float softcap=0.0, bool causal=False, int window=0) -> Tensor"
)
QUERY_ROWS = 128


def attention_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
) -> Tensor:
    """The truth: one query at a time over the keys that it may see."""
    batch, heads, length, _ = q.shape
    keys = k.shape[2]
    dtype = accumulation_dtype(q.dtype)
    k, v = (x.to(dtype).repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    bias = None if bias is None else bias.expand(batch, heads, length, keys)
    outputs = []
    for t in range(length):
        last = t + keys - length
        s = scale * torch.einsum("bhd,bhsd->bhs", q[:, :, t].to(dtype), k)
        s = softcap * torch.tanh(s / softcap) if softcap > 0 else s
        seen = torch.ones_like(s, dtype=torch.bool)
        for j in range(keys):
            seen[..., j] = (not causal or j <= last) and (window <= 0 or j > last - window)
        if bias is not None and bias.dtype == torch.bool:
            seen &= bias[:, :, t]
        elif bias is not None:
            seen &= bias[:, :, t] > torch.finfo(bias.dtype).min / 2
            s = s + bias[:, :, t].to(dtype)
        s = s.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            s = torch.cat([s, sinks.to(dtype)[None, :, None].expand(batch, heads, 1)], dim=-1)
        p = torch.softmax(s, dim=-1).masked_fill(s == float("-inf"), 0.0)  # a row of NaN is a row of masked keys
        outputs.append(torch.einsum("bhs,bhsv->bhv", p[..., :keys], v))
    return lay_out(torch.stack(outputs, dim=2), q.dtype)


def attention_decomposed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
) -> Tensor:
    """Standard operators, no loop, T and S dynamic; holds the scores [B,H,T,S]."""
    length, keys = q.shape[2], k.shape[2]
    seen = visible_keys(length, keys, keys - length, causal, window, q.device)
    return lay_out(attend(q, k, v, bias, seen, sinks, scale, softcap), q.dtype)


def attention_streamed(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
) -> Tensor:
    """`QUERY_ROWS` queries at a time over the keys in their reach, each piece recomputed in its backward."""
    pieces = []
    for start, stop, low, high, seen in query_pieces(q.shape[2], k.shape[2], causal, window, q.device):
        piece = q[:, :, start:stop], k[:, :, low:high], v[:, :, low:high], slice_bias(bias, start, stop, low, high)
        args = (*piece, seen, sinks, scale, softcap)
        pieces.append(checkpoint(attend, *args, use_reentrant=False, preserve_rng_state=False))
    return lay_out(torch.cat(pieces, dim=2), q.dtype)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    seen: Tensor | None,
    sinks: Tensor | None,
    scale: float,
    softcap: float,
) -> Tensor:
    """Attention over the keys where `seen` [T,S] holds (None = all), in the accumulation dtype; [B,H,T,dv]."""
    batch, heads, length, head_dim = q.shape
    kv_heads, keys = k.shape[1], k.shape[2]
    rows = heads // kv_heads * length
    dtype = accumulation_dtype(q.dtype)
    folded = (q.to(dtype) * scale).reshape(batch, kv_heads, rows, head_dim)
    scores = (folded @ k.to(dtype).transpose(-1, -2)).reshape(batch, heads, length, keys)
    scores = softcap * torch.tanh(scores / softcap) if softcap > 0 else scores
    scores = mask_scores(scores, bias, seen)
    top = scores.detach().amax(dim=-1, keepdim=True)
    sink = None if sinks is None else sinks.to(dtype)[:, None, None]
    top = top if sink is None else torch.maximum(top, sink.detach())
    top = top.masked_fill(top == float("-inf"), 0.0)
    weights = torch.exp(scores - top)
    total = weights.sum(dim=-1, keepdim=True)
    total = total if sink is None else total + torch.exp(sink - top)
    mixed = weights.reshape(batch, kv_heads, rows, keys) @ v.to(dtype)
    return mixed.reshape(batch, heads, length, v.shape[3]) / total.masked_fill(total == 0, 1.0)


def mask_scores(scores: Tensor, bias: Tensor | None, seen: Tensor | None) -> Tensor:
    """Add or apply the bias, then hide what `seen` excludes, with -inf."""
    hidden = None if seen is None else ~seen
    if bias is not None and bias.dtype == torch.bool:
        scores = scores.masked_fill(~bias, float("-inf"))
    elif bias is not None:
        scores = scores + bias.to(scores.dtype)
        masked = bias <= torch.finfo(bias.dtype).min / 2
        hidden = masked if hidden is None else hidden | masked
    return scores if hidden is None else scores.masked_fill(hidden, float("-inf"))


def visible_keys(length: int, keys: int, offset: int, causal: bool, window: int, device: torch.device) -> Tensor | None:
    """Bool [T,S]: key j is in reach of query t, which stands at key index t + `offset`; None when all are."""
    if not causal and window <= 0:
        return None
    t = torch.arange(length, device=device)[:, None] + offset
    j = torch.arange(keys, device=device)[None, :]
    if window <= 0:
        return j <= t
    return (j <= t) & (j > t - window) if causal else j > t - window


def query_pieces(
    length: int, keys: int, causal: bool, window: int, device: torch.device, rows: int = QUERY_ROWS
) -> list[tuple[int, int, int, int, Tensor | None]]:
    """(start, stop, low, high, seen): queries start..stop reach keys low..high only, and `seen` says which of them."""
    pieces = []
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        high = max(1, stop + keys - length) if causal else keys
        low = min(max(0, start + keys - length - window + 1), high - 1) if window > 0 else 0
        seen = visible_keys(stop - start, high - low, start + keys - length - low, causal, window, device)
        pieces.append((start, stop, low, high, seen))
    return pieces


def slice_bias(bias: Tensor | None, start: int, stop: int, low: int, high: int) -> Tensor | None:
    """The part of a broadcastable bias for queries start..stop and keys low..high."""
    if bias is None:
        return None
    bias = bias[..., low:high] if bias.ndim > 0 and bias.shape[-1] > 1 else bias
    return bias[..., start:stop, :] if bias.ndim > 1 and bias.shape[-2] > 1 else bias


def check_attention(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None) -> None:
    """Raise `OperatorError` unless heads, lengths and head dims fit together."""
    heads, kv_heads = q.shape[1], k.shape[1]
    require(heads % kv_heads == 0, "attention", f"{heads} query heads are no multiple of {kv_heads} kv heads")
    require(k.shape[3] == q.shape[3], "attention", f"head dim of k is {k.shape[3]}, of q {q.shape[3]}")
    require(k.shape[:3] == v.shape[:3], "attention", f"k {tuple(k.shape)} and v {tuple(v.shape)} differ in [B,G,S]")
    require(sinks is None or sinks.shape[0] == heads, "attention", "sinks must hold one logit per query head")


def _fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    sinks: Tensor | None = None,
    *,
    scale: float,
    softcap: float = 0.0,
    causal: bool = False,
    window: int = 0,
) -> Tensor:
    check_attention(q, k, v, sinks)
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def lay_out(output: Tensor, dtype: torch.dtype) -> Tensor:
    """[B,H,T,dv] in memory as [B,T,H,dv], so that merging the heads afterwards is a view."""
    return output.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)


ATTENTION = define_operator(
    SCHEMA,
    fake=_fake,
    reference=attention_decomposed,
    recurrence=attention_recurrence,
    streamed=attention_streamed,
)
attention = ATTENTION.overload
